"""Every figure of metrics.json: name, group, unit and meaning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Described:
    """A metrics key in words. `unit` is a suffix, or share (0 to 1), count, duration, rate, text, exact or plain."""

    group: str
    name: str
    unit: str
    meaning: str


_RECONSTRUCTION, _GENERATION, _COMPRESSION = "Reconstruction", "Generation", "Compression"

_FRECHET = "Distance between {} and the reference images' features, in the named feature space"

METRICS = {
    "psnr_test": Described(
        _RECONSTRUCTION, "PSNR, test", "dB", "Mean over test images of each image's PSNR. Higher is better."
    ),
    "psnr_test_pooled": Described(
        _RECONSTRUCTION, "PSNR, test, pooled", "dB", "PSNR of the mean squared error over all test images."
    ),
    "psnr_train": Described(
        _RECONSTRUCTION, "PSNR, training", "dB", "The same on training images; far above test means overfitting."
    ),
    "psnr_train_pooled": Described(
        _RECONSTRUCTION, "PSNR, training, pooled", "dB", "PSNR of the mean squared error over the same images."
    ),
    "psnr_images": Described(
        _RECONSTRUCTION, "Images measured", "count", "Whose PSNR it is; a subset is spread over its split."
    ),
    "psnr_pca_patch": Described(
        _RECONSTRUCTION,
        "PSNR, patch PCA",
        "dB",
        "Linear baseline: one PCA shared by all patches, as many numbers per patch.",
    ),
    "psnr_pca_image": Described(
        _RECONSTRUCTION,
        "PSNR, whole-image PCA",
        "dB",
        "Linear baseline: a PCA of whole images, as many numbers per image.",
    ),
    "psnr_by_bits": Described(
        _RECONSTRUCTION,
        "PSNR, test, by bits",
        "dB",
        "Test PSNR after storing each latent number in so many bits.",
    ),
    "psnr_by_step": Described(
        _RECONSTRUCTION, "PSNR by inner step", "dB", "PSNR after so many inner gradient steps, before quantisation."
    ),
    "top1_last": Described("Classification", "Top-1, last", "share", "Test accuracy after the last step."),
    "top1_best": Described(
        "Classification", "Top-1, best", "share", "Best test accuracy on the way (what the paper reports)."
    ),
    "top1_pixels": Described(
        "Classification",
        "Top-1 of the pixel classifier",
        "share",
        "How good the feature space of Fréchet distances is.",
    ),
    "clip_fraction": Described(
        _COMPRESSION, "Clipped latent numbers", "share", "Outside the quantiser's range, moved to its border."
    ),
    "fd_reference": Described(
        _GENERATION,
        "Reference set of distances",
        "text",
        "Which images, how many, how many samples, feature dimensions.",
    ),
    "sampling": Described(_GENERATION, "Sampling", "text", "How the samples were drawn from the diffusion model."),
    "mae_255": Described(_RECONSTRUCTION, "Mean absolute error", "grey levels", "Of 255, over all test pixels."),
    "bits_per_dim": Described(
        _COMPRESSION, "Bits per latent number", "bits", "Measured: all bytes stored for the latents over their count."
    ),
    "compression": Described(
        _COMPRESSION,
        "Stored latents",
        "plain",
        "By bits a number: bits per pixel, entropy coded, uncoded and with the field; PSNR in dB of 8-bit images.",
    ),
    "compression_jpeg": Described(
        _COMPRESSION, "JPEG", "plain", "By quality: bits per pixel of whole files, of their scans alone; PSNR in dB."
    ),
    "compression_webp": Described(
        _COMPRESSION, "WebP", "plain", "By quality: bits per pixel of whole files; PSNR in dB."
    ),
    "compression_of": Described(
        _COMPRESSION, "Rates and distortions", "count", "How many images, and the field that decodes them."
    ),
    "top1_test": Described(
        "Classification",
        "Top-1 accuracy, test",
        "share",
        "Share of test images whose class the latent classifier names.",
    ),
    "top5_test": Described(
        "Classification",
        "Top-5 accuracy, test",
        "share",
        "Share of test images whose class is among the first five guesses.",
    ),
    "ece": Described(
        "Classification",
        "Expected calibration error",
        "share",
        "Mean gap between the classifier's confidence and its accuracy. Lower is better.",
    ),
    "accuracy_by_class": Described("Classification", "Accuracy", "share", "Of the test images of this class."),
    "empty_classes": Described(
        "Classification", "Classes without test images", "text", "No accuracy can be given for them."
    ),
    "fid": Described(
        _GENERATION, "FID", "plain", "Fr\u00e9chet Inception distance of samples to real images. Lower is better."
    ),
    "fid_reconstruction": Described(
        _GENERATION, "FID, reconstructions", "plain", "FID of reconstructed training images: the floor for samples."
    ),
    "fid_protocol": Described(
        _GENERATION, "FID, protocol", "text", "Weights, resize, counts, reference set and versions behind the FID."
    ),
    "inception_protocol": Described(
        _GENERATION, "Inception, protocol", "text", "What a distance on Inception features, which is not FID, was of."
    ),
    "kd": Described(
        _GENERATION,
        "Kernel distance, samples",
        "plain",
        "Unbiased squared MMD between features of samples and of reference images; may be negative, lower is better.",
    ),
    "precision": Described(
        _GENERATION, "Precision, samples", "share", "Share of samples within the reference's manifold of features."
    ),
    "recall": Described(
        _GENERATION, "Recall, samples", "share", "Share of reference images within the samples' manifold of features."
    ),
    "duplicates": Described(
        _GENERATION, "Duplicate samples", "count", "Samples that repeat another one pixel by pixel."
    ),
    "fd": Described(
        _GENERATION, "Fr\u00e9chet distance, samples", "plain", _FRECHET.format("samples") + "; lower is better."
    ),
    "fd_reconstruction": Described(
        _GENERATION,
        "Fr\u00e9chet distance, reconstructions",
        "plain",
        _FRECHET.format("reconstructions") + ": the floor for samples.",
    ),
    "fd_noise": Described(
        _GENERATION,
        "Fr\u00e9chet distance, noise",
        "plain",
        _FRECHET.format("decoded noise latents") + ": the ceiling for samples.",
    ),
    "label_agreement": Described(
        _GENERATION,
        "Label agreement",
        "share",
        "Share of conditional samples that the pixel classifier takes for their label.",
    ),
    "distinct": Described(
        _GENERATION,
        "Distinct nearest neighbours",
        "count",
        "How many different training images are nearest to the samples; few means memorised.",
    ),
    "distinct_expected": Described(
        _GENERATION,
        "Distinct, expected",
        "count",
        "Of a model that draws its training images evenly; far fewer are found of one that draws only some.",
    ),
    "distinct_sd": Described(_GENERATION, "Distinct, expected sd", "plain", "Standard deviation of that count."),
    "memorized_share": Described(
        _GENERATION,
        "Samples that repeat a training image",
        "share",
        "Nearer to one training image's reconstruction, and more isolated, than 95 % of test images; chance gives at "
        "most 5 %.",
    ),
    "memorized_share_images": Described(
        _GENERATION, "The same, in pixel space", "share", "Compared with training images instead of reconstructions."
    ),
    "memorized": Described(
        _GENERATION,
        "Memorised",
        "text",
        "Whether 15 % of the samples or more repeat a training image; left out where test images do themselves.",
    ),
    "locality": Described(
        "Latents",
        "Locality",
        "plain",
        "Share of the squared change inside its own patch when one latent position is perturbed; of vectors the "
        "largest share of any patch when one entry is.",
    ),
    "perturbation": Described(
        "Latents",
        "Perturbation",
        "plain",
        "One channel moved everywhere: R\u00b2 of its effect's line (median channel), mean cosine of the patterns "
        "between patches and between images. Of vectors: mean absolute error in grey levels of one entry's sd.",
    ),
    "latent_sd": Described(
        "Latents", "Standard deviation", "plain", "Of a training latent's numbers, root mean square over elements."
    ),
    "rows": Described("Data", "Rows in the functaset", "count", "Encoded images, augmentations included."),
    "bad_inputs": Described("Data", "Bad inputs", "count", "Images that could not be read and were left out."),
    "encode_images_per_s": Described("Speed", "Encoding", "rate", "Images encoded into latents."),
    "meta_images_per_s": Described("Speed", "Meta-training", "rate", "Images seen in meta-training."),
    "seconds_by_stage": Described("Speed", "Time", "duration", "Wall time of the stage."),
    "parameters": Described("Models", "Parameters", "count", "Trained numbers of the model."),
    "fingerprint": Described("Provenance", "Fingerprint", "text", "Of everything chosen that determines the latents."),
    "versions": Described("Provenance", "Version", "text", "Of the software that measured this."),
}

GROUPS = tuple(dict.fromkeys(described.group for described in METRICS.values())) + ("Other",)

BY_SPACE = ("fd", "fd_reconstruction", "fd_noise", "kd", "precision", "recall")  # keys with a value for each space

SPACES = {
    "classifier": "pixel-classifier features", "latent": "latents", "inception": "Inception features",
    "inception_other": "features of other Inception weights",
}  # fmt: skip
