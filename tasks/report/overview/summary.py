"""The first screen of the report: what was done in one sentence, what limits it, and what the terms mean."""

from dataclasses import dataclass
from typing import Any

from functa.tasks.report.blocks import ReportData
from functa.tasks.report.words import number, show

FEW_FOR_FIELD, FEW_FOR_DIFFUSION, FEW_FOR_TEST, FEW_OF_A_CLASS = 256, 1000, 100, 20
"""Images below which a model or a figure deserves a warning: our judgement, from runs on small folders."""

TERMS = (
    ("Field", "A small neural network that returns the colour at a coordinate. One field is shared by all images."),
    ("Latent", "The numbers that adapt the field to one image: a small grid of positions with some channels each."),
    ("Functaset", "The store of all latents with their labels and the field: the dataset that later models learn on."),
    ("Meta-training", "Training of the field such that few gradient steps on a latent suffice for any image."),
    ("Inner step", "One such gradient step on a latent, from zero. The field itself does not change."),
    ("PSNR", "Peak signal-to-noise ratio in decibels: 10 dB more is a tenth of the squared error. About 30 dB looks "
             "close, 40 dB hardly differs."),
    ("Patch PCA, whole-image PCA", "The best that a linear method does with as many numbers: of each patch, or of the "
                                   "whole image."),
    ("Top-1", "Share of test images whose class the classifier names at its first guess."),
    ("Calibration error", "Mean gap between how sure the classifier is and how often it is right."),
    ("Fr\u00e9chet distance", "How far the features of samples are from those of real images; 0 is equal in mean and "
                         "covariance. Distances of different features cannot be compared."),
    ("Floor and ceiling", "The same distance of reconstructed real images (no sample can be expected to do better) and "
                          "of decoded noise (a model that learned nothing)."),
    ("Fingerprint", "A digest of every choice that determines the latents: equal fingerprints, comparable latents."),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of an image and of its latent."""

    image: tuple[int, int, int]  # height, width, channels
    latent: tuple[int, ...]
    numbers: int

    @property
    def values(self) -> int:
        """Count the values of one image."""
        height, width, channels = self.image
        return height * width * channels

    @property
    def latent_words(self) -> str:
        """Write the latent's shape: 2\u00d72\u00d78."""
        return "\u00d7".join(map(str, self.latent))


def shape_of(data: ReportData) -> Shape | None:
    """Return the shapes of image and latent; None where the run does not have them."""
    field = data.config.get("field")
    if not isinstance(field, dict) or "channels" not in field or data.originals is None or not len(data.originals):
        return None
    positions, channels = (field["spatial"],) * int(field.get("axes", 2)), field["channels"]
    height, width, depth = data.originals.shape[1:]
    numbers = channels
    for side in positions:
        numbers *= side
    return Shape((height, width, depth), (*positions, channels), numbers)


def summary(data: ReportData) -> str:
    """Describe in a few sentences what was turned into what, and how well."""
    shape = shape_of(data)
    if shape is None:
        return ""
    images = sum(data.images_by_split.values())
    height, width, _ = shape.image
    subject = f"{images:,} images" if images else "Images"
    steps = (data.config.get("inner") or {}).get("steps")
    done = f"by {steps} gradient step{'s' if steps != 1 else ''} through one shared neural field" if steps else ""
    sentences = [
        f"{subject} of {height}\u00d7{width} pixels ({shape.values:,} values each) were each encoded into "
        f"{shape.latent_words} = {shape.numbers:,} numbers {done}".rstrip()
        + "."
    ]
    sentences += [sentence for sentence in (_decoded(data), _classified(data), _sampled(data)) if sentence]
    return " ".join(sentences)


def _decoded(data: ReportData) -> str:
    psnr, test = number(data.metrics, "psnr_test"), data.images_by_split.get("test")
    if psnr is None:
        return ""
    which = f"the {test:,} test images" if test else "test images"
    return f"Decoded again, {which} reach a mean PSNR of {psnr:.1f} dB."


def _classified(data: ReportData) -> str:
    top1 = number(data.metrics, "top1_test")
    if top1 is None:
        return ""
    of = f" of {len(data.classes)}" if data.classes else ""
    return f"A classifier that sees only these numbers names the right class{of} for {show(top1, 'share')} of them."


def _sampled(data: ReportData) -> str:
    samples = number(data.metrics, "fd_reference", "samples")
    if samples is None:
        return ""
    return f"A diffusion model that learned them drew {samples:,.0f} new images."


def warnings(data: ReportData) -> tuple[str, ...]:
    """Name the models and figures that are based on too few images."""
    found = []
    training, test = data.images_by_split.get("train"), data.images_by_split.get("test")
    if training is not None and training < FEW_FOR_FIELD:
        found.append(
            f"The field was trained on {training:,} images: PSNR on other images may be far lower than on these. "
            f"Use some hundreds or more."
        )
    if training is not None and "train_diffusion" in data.curves and training < FEW_FOR_DIFFUSION:
        found.append(
            f"The diffusion model was trained on {training:,} images: expect noise, or copies of these. "
            "Use some thousands."
        )
    if training is not None and "train_classifier" in data.curves and data.classes:
        each = training / len(data.classes)
        if each < FEW_OF_A_CLASS:
            found.append(f"The classifier was trained on {each:.0f} images a class, which is few.")
    if test is not None and test < FEW_FOR_TEST:
        few = f"{test:,} test image{'s' if test > 1 else ''}"
        found.append(f"{few}: the mean PSNR of other images may differ.")
        if number(data.metrics, "top1_test") is not None:
            found[-1] = f"{few}: one image more or less right changes the accuracy by {1 / test:.1%}."
    return tuple(found)


def title(config: dict[str, Any]) -> str:
    """Name the data and the preset: "photos (cifar10_quick)"."""
    images, preset = config.get("images") or {}, str(config.get("name", ""))
    location = str(images.get("location") or "").rstrip("/")
    name = location.rpartition("/")[2] or str(images.get("source", ""))
    return preset if name in ("", preset) else f"{name} ({preset})"
