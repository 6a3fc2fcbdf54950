"""The table of evaluators, in the order in which they run and are shown.

To add one: write a file with the function that measures and the one that draws its section, and an entry here. The
task, metrics.json, the catalogue of figures, the report, `functa compare` and sweeps read this table. An evaluator
whose name is a key of the config's evaluation section is left out where that key is null.
"""

from functa.tasks.evaluation.config import EvaluationConfig
from functa.tasks.evaluation.evaluator import OF_DIFFUSION, Described, Evaluator

_SECTIONS = "functa.tasks.report.sections"

EVALUATORS: tuple[Evaluator, ...] = (
    Evaluator(
        "reconstruction",
        "functa.tasks.evaluation.reconstruction:measure",
        (f"{_SECTIONS}.reconstructions:section", f"{_SECTIONS}.psnr:section"),
        figures={
            "psnr_test": Described(
                "Reconstruction", "PSNR, test", "dB", "Mean over test images of each image's PSNR.", "higher", "test"
            ),
            "psnr_test_pooled": Described(
                "Reconstruction", "PSNR, test, pooled", "dB", "PSNR of the mean squared error over all test images.",
                "higher", "test",
            ),
            "psnr_test_clamped": Described(
                "Reconstruction", "PSNR, test, clamped", "dB",
                "As PSNR, test, of pixels clamped to [0, 1]: higher where an image is black or white.",
                "higher", "test",
            ),
            "psnr_train": Described(
                "Reconstruction", "PSNR, training", "dB",
                "The same on training images; far above test means overfitting.", "higher", "train",
            ),
            "psnr_train_pooled": Described(
                "Reconstruction", "PSNR, training, pooled", "dB",
                "PSNR of the mean squared error over the same images.", "higher", "train",
            ),
            "psnr_images": Described(
                "Reconstruction", "Images measured", "count",
                "Over which PSNR is measured; a subset is spread evenly over its split.",
            ),
            "psnr_pca_patch": Described(
                "Reconstruction", "PSNR, patch PCA", "dB",
                "Linear baseline: one PCA shared by all patches, as many numbers per patch.", "higher", "test",
            ),
            "psnr_pca_image": Described(
                "Reconstruction", "PSNR, whole-image PCA", "dB",
                "Linear baseline: a PCA of whole images, as many numbers per image.", "higher", "test",
            ),
            "psnr_by_step": Described(
                "Reconstruction", "PSNR by inner step", "dB",
                "PSNR after so many inner gradient steps, before quantisation.", "higher", "test",
            ),
            "psnr_by_more_steps": Described(
                "Reconstruction", "PSNR by more inner steps", "dB",
                "PSNR of up to 64 test images after more steps than the training took; encode.steps takes more.",
                "higher", "test",
            ),
            "mae_255": Described(
                "Reconstruction", "Mean absolute error", "grey levels", "On a scale of 0 to 255, over all test pixels.",
                "lower", "test",
            ),
        },
    ),
    Evaluator(
        "sampling",
        "functa.tasks.evaluation.generation.sampling:measure",
        (f"{_SECTIONS}.samples:section",),
        needs=("diffusion", "samples"),
        figures={
            "sampling": Described(
                "Generation", "Sampling", "text", "How the samples were drawn from the diffusion model."
            ),
        },
    ),
    Evaluator(
        "compression",
        "functa.tasks.evaluation.compression:measure",
        (f"{_SECTIONS}.compression:section",),
        figures={
            "psnr_by_bits": Described(
                "Reconstruction", "PSNR, test, by bits", "dB",
                "Test PSNR after storing each latent number in so many bits.", "higher", "test",
            ),
            "compression": Described(
                "Compression", "Stored latents", "plain",
                "By bits a number: bits per pixel, entropy coded, uncoded and with the field; PSNR in dB of 8-bit "
                "images.", split="test",
            ),
            "compression_jpeg": Described(
                "Compression", "JPEG", "plain",
                "By quality: bits per pixel of whole files, of their scans alone; PSNR in dB.", split="test",
            ),
            "compression_webp": Described(
                "Compression", "WebP", "plain", "By quality: bits per pixel of whole files; PSNR in dB.", split="test"
            ),
            "compression_of": Described(
                "Compression", "Rates and distortions", "count", "How many images, and the field that decodes them.",
                split="test",
            ),
        },
    ),
    Evaluator(
        "perturbation",
        "functa.tasks.evaluation.perturbation:measure",
        (f"{_SECTIONS}.perturbation:section",),
        figures={
            "locality": Described(
                "Latents", "Locality", "plain",
                "Share of the squared change inside its own patch when one latent position is perturbed; of vectors "
                "the largest share of any patch when one entry is.", "higher",
            ),
            "perturbation": Described(
                "Latents", "Perturbation", "plain",
                "One channel moved everywhere: R\u00b2 of its effect's line (median channel), mean cosine of the "
                "patterns between patches and between images. Of vectors: mean absolute error in grey levels of one "
                "entry's standard deviation.",
            ),
            "latent_sd": Described(
                "Latents", "Standard deviation", "plain",
                "Standard deviation of a training latent's numbers, root mean square over elements.",
            ),
        },
    ),
    Evaluator(
        "classification",
        "functa.tasks.evaluation.classification:measure",
        (f"{_SECTIONS}.classification:section",),
        needs=("classifier",),
        figures={
            "top1_test": Described(
                "Classification", "Top-1 accuracy, test", "share",
                "Share of test images whose class the latent classifier names.", "higher", "test",
            ),
            "top5_test": Described(
                "Classification", "Top-5 accuracy, test", "share",
                "Share of test images whose class is among the first five guesses.", "higher", "test",
            ),
            "ece": Described(
                "Classification", "Expected calibration error", "share",
                "Mean gap between the classifier's confidence and its accuracy.", "lower", "test",
            ),
            "accuracy_by_class": Described(
                "Classification", "Accuracy", "share",
                "Share of this class's test images that are classified correctly.", "higher", "test",
            ),
            "empty_classes": Described(
                "Classification", "Classes without test images", "text", "No accuracy can be given for them."
            ),
        },
    ),
    Evaluator(
        "generation",
        "functa.tasks.evaluation.generation.distances:measure",
        (f"{_SECTIONS}.generation:section",),
        needs=("diffusion", "samples", "features"),
        figures={
            "fid": Described(
                "Generation", "FID", "plain", "Fr\u00e9chet Inception distance of samples to real images.", "lower",
                "samples",
            ),
            "fid_reconstruction": Described(
                "Generation", "FID, reconstructions", "plain",
                "FID of reconstructed training images: the floor for samples.", "lower", "samples",
            ),
            "fid_protocol": Described(
                "Generation", "FID, protocol", "text",
                "Weights, resize, counts, reference set and versions behind the FID.",
            ),
            "inception_protocol": Described(
                "Generation", "Inception, protocol", "text",
                "Weights, resize, counts and reference set of a distance on Inception features that is not FID.",
            ),
            "fd": Described(
                "Generation", "Fr\u00e9chet distance, samples", "plain",
                "Distance between samples and the reference images' features, in the named feature space.", "lower",
                "samples",
            ),
            "fd_reconstruction": Described(
                "Generation", "Fr\u00e9chet distance, reconstructions", "plain",
                "The same for reconstructions: the floor for samples.", "lower", "samples",
            ),
            "fd_test": Described(
                "Generation", "Fr\u00e9chet distance, test images", "plain",
                "The same for test images, at most as many as samples: the floor of images that no model has seen.", "",
                "samples",
            ),
            "fd_noise": Described(
                "Generation", "Fr\u00e9chet distance, noise", "plain",
                "The same for decoded noise latents: the ceiling for samples.", "", "samples",
            ),
            "fd_reference": Described(
                "Generation", "Reference set of distances", "text",
                "Which images, how many, how many samples and test images, feature dimensions.",
            ),
            "fd_protocol": Described(
                "Generation", "Feature spaces, protocol", "text",
                "Weights, input and wavelet level behind the features.",
            ),
            "kd": Described(
                "Generation", "Kernel distance, samples", "plain",
                "Unbiased squared MMD between features of samples and of reference images; may be negative.", "lower",
                "samples",
            ),
            "precision": Described(
                "Generation", "Precision, samples", "share",
                "Share of samples within the reference's manifold of features.", "higher", "samples",
            ),
            "recall": Described(
                "Generation", "Recall, samples", "share",
                "Share of reference images within the samples' manifold of features.", "higher", "samples",
            ),
            "duplicates": Described(
                "Generation", "Duplicate samples", "count", "Samples that repeat another one pixel by pixel.", "lower",
                "samples",
            ),
            "label_agreement": Described(
                "Generation", "Label agreement", "share",
                "Share of conditional samples that a linear probe of training images' features takes for their label.",
                "higher", "samples",
            ),
            "probe_top1": Described(
                "Generation", "Top-1 of the probe", "share",
                "Share of test images that this probe takes for their label: as much as label agreement can show.",
                "higher", "test",
            ),
            "top1_pixels": Described(
                "Classification", "Top-1 of the pixel classifier", "share",
                "How good the feature space of Fr\u00e9chet distances is.", "higher", "test",
            ),
        },
    ),
    Evaluator(
        "memorization",
        "functa.tasks.evaluation.generation.memorization:measure",
        (f"{_SECTIONS}.memorization:section",),
        needs=("diffusion", "draws"),
        figures={
            "distinct": Described(
                "Generation", "Distinct nearest neighbours", "count",
                "How many different training images are nearest to the samples; few means memorised.", "", "samples",
            ),
            "distinct_expected": Described(
                "Generation", "Distinct, expected", "count",
                "Count for a model that draws its training images evenly; a model that draws only some has far fewer.",
                "", "samples",
            ),
            "distinct_sd": Described(
                "Generation", "Distinct, expected sd", "plain", "Standard deviation of that count.", "", "samples"
            ),
            "memorized_share": Described(
                "Generation", "Samples that repeat a training image", "share",
                "Nearer to one training image's reconstruction, and more isolated, than 95 % of test images; chance "
                "gives at most 5 %.", "lower", "samples",
            ),
            "memorized_share_images": Described(
                "Generation", "The same, in pixel space", "share",
                "Compared with training images instead of reconstructions.", "lower", "samples",
            ),
            "memorized": Described(
                "Generation", "Memorised", "text",
                "Whether 15 % of the samples or more repeat a training image; left out if test images do so "
                "themselves.",
            ),
        },
    ),
)  # fmt: skip


def find(name: str) -> Evaluator:
    """Return the evaluator of this name. Raises KeyError if the table has none."""
    return {evaluator.name: evaluator for evaluator in EVALUATORS}[name]


def chosen(evaluation: EvaluationConfig, models: set[str]) -> list[Evaluator]:
    """Return the evaluators that the config requests; `models` names those of classifier and diffusion that exist."""
    missing = {"classifier"} - models | (set() if "diffusion" in models else set(OF_DIFFUSION))
    missing |= {evaluator.name for evaluator in EVALUATORS if getattr(evaluation, evaluator.name, True) is None}
    return [evaluator for evaluator in EVALUATORS if not missing & {evaluator.name, *evaluator.needs}]
