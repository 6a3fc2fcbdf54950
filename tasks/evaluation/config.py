"""Configuration of what is measured, and of what a run must reach. Free of torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from functa.models.config import ADDED, ENVIRONMENT, ONCE, Config
from functa.tasks.config import PixelClassifierConfig

Bits = Annotated[int, Field(ge=1, le=8)]


Quality = Annotated[int, Field(ge=1, le=100)]


class CompressionConfig(Config):
    """Rate and distortion of test images, beside JPEG and WebP."""

    images: int = Field(1000, ge=1, le=1_000_000, description="Test images; fewer of large ones (2^24 pixels in all).")
    jpeg: tuple[Quality, ...] = Field(
        (2, 5, 10, 20, 35, 50, 65, 80, 90, 95), description="JPEG qualities of the rate-distortion plot."
    )
    webp: tuple[Quality, ...] = Field(
        (1, 5, 10, 25, 50, 75, 90, 95), description="WebP qualities (lossy) of the rate-distortion plot."
    )


class MemorizationConfig(Config):
    """Whether the diffusion model repeats its training images (App. C.2)."""

    draws_per_class: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Samples of each class drawn for the distinct counts of Table 7 (paper: 5,000); null: those that "
        "are drawn anyway. Conditional models only.",
    )
    null_images: int = Field(
        2000, ge=2, le=1_000_000, description="Test images that show how near unseen images lie to the training set."
    )
    shown: int = Field(8, ge=1, le=64, description="Samples shown beside their nearest training images (Fig. 5).")


class PerturbationConfig(Config):
    """Change single latent numbers and look at the image (App. B.3 and C.5)."""

    images: int = Field(8, ge=1, le=1024, description="Test images whose latents are perturbed.")
    positions: int = Field(16, ge=1, le=16384, description="Latent positions perturbed, spread over the grid.")
    channels: int | None = Field(
        None, ge=1, le=16384, description="Channels (of vectors: entries) perturbed, at most all; null: 64, and fewer "
        "of large images.", json_schema_extra={ONCE: 64},
    )  # fmt: skip
    show_channel: int | None = Field(
        None, ge=0, le=16383, description="Channel moved everywhere in the picture of Fig. 12, counted from 0 (the "
        "paper's 26th is 25); null: the one of median effect.", json_schema_extra=ADDED,
    )  # fmt: skip
    strengths: tuple[float, ...] = Field(
        (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2),
        min_length=2,
        description="What is added to a channel everywhere (paper: -0.2 to 0.2).",
    )
    grid: int = Field(8, ge=1, le=128, description="Patches per side at which the locality of vectors is measured.")

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, given: Any) -> Any:
        """Take the 64 channels of a section that an earlier version wrote out as a whole for its default."""
        if isinstance(given, dict) and cls.model_fields.keys() - given.keys() == {"show_channel"}:
            return {key: value for key, value in given.items() if (key, value) != ("channels", 64)}
        return given

    @field_validator("strengths")
    @classmethod
    def _perturb(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 0 in value or max(value) < 0:
            raise ValueError("a strength of 0 perturbs nothing, and pictures show the largest: give one above 0")
        return value


class FidConfig(Config):
    """FID: Frechet distance on the standard Inception features. Nothing is ever downloaded for it."""

    weights: str | None = Field(
        None,
        min_length=1,
        description="Local path of weights-inception-2015-12-05-6726825d.pth (torch-fidelity's); null: no FID.",
    )
    any_weights: bool = Field(
        False, description="Take a file of another digest; the distance is then fd.inception_other, not FID."
    )
    min_samples: int = Field(10_000, ge=2049, description="Fewer samples or reference images are refused.")
    few: bool = Field(False, description="Measure with fewer too; the distance is then fd.inception, not FID.")
    batch: int = Field(
        64, ge=1, le=4096, description="Images at a time: part of the protocol, features differ a little by it."
    )


class PartConfig(Config):
    """A part of the evaluation that has no settings of its own."""


SpaceName = Literal["classifier", "latent", "wavelet", "efficientnet_lite0"]


class GenerationConfig(Config):
    """Distances of samples from the training images, in several feature spaces."""

    spaces: tuple[SpaceName, ...] | None = Field(
        None,
        min_length=1,
        description="Feature spaces; null: all that the images allow and whose packages are installed. One that is "
        "named and cannot be measured is an error.",
        json_schema_extra=ADDED,
    )


SLOW = ("compression", "perturbation", "generation", "memorization")


def _part(default: Config, title: str, what: str) -> Any:
    """A section that null leaves out; a form shows `what` as its two choices, not the names of our classes."""

    def name_choices(schema: dict[str, Any]) -> None:
        for choice, name in zip(schema["anyOf"], (what, "Leave it out")):
            choice["title"] = name

    return Field(default, title=title, description=f"{what}; null leaves it out.", json_schema_extra=name_choices)


class EvaluationConfig(Config):
    """The evaluation at the end of a run. Each part can be left out by null, all slow ones by quick."""

    quick: bool = Field(
        False,
        description=f"Leave out what takes long: sets {', '.join(SLOW)} to null, whatever else they are set to.",
        json_schema_extra=ENVIRONMENT,  # the sections that it sets to null are part of the digest
    )
    samples: int = Field(
        1000, ge=2, le=1_000_000, description="Samples for Frechet distances: at most as many as training images."
    )
    batch: int = Field(256, ge=1, le=65536, description="Samples at a time.", json_schema_extra=ENVIRONMENT)
    slice: int = Field(
        1024, ge=1, le=1_000_000, description="Samples per dispatched task.", json_schema_extra=ENVIRONMENT
    )
    shown: int = Field(16, ge=1, le=256, description="Images and samples shown in the report.")
    bits: tuple[Bits, ...] = Field((8, 7, 6, 5, 4), description="Bits at which test PSNR is measured (Fig. 11).")
    features_slice: int = Field(
        5000, ge=1, le=1_000_000, description="Images per task that computes features.", json_schema_extra=ENVIRONMENT
    )
    subset: int = Field(
        5000, ge=4, le=50_000, description="At most so many of a set give kernel distance, precision and recall."
    )
    allow_duplicates: bool = Field(
        False, description="Measure samples of which more than half repeat another one, pixel by pixel."
    )
    fid: FidConfig = Field(FidConfig(), title="FID")
    pixel_classifier: PixelClassifierConfig = Field(PixelClassifierConfig(), title="Pixel classifier")
    reconstruction: PartConfig | None = _part(PartConfig(), "Reconstruction", "Measure PSNR")
    compression: CompressionConfig | None = _part(
        CompressionConfig(), "Compression", "Compare stored latents with JPEG and WebP"
    )
    perturbation: PerturbationConfig | None = _part(
        PerturbationConfig(), "Perturbation", "Change single latent numbers and decode"
    )
    classification: PartConfig | None = _part(PartConfig(), "Classification", "Measure the classifier's accuracy")
    generation: GenerationConfig | None = _part(
        GenerationConfig(), "Generation", "Compare samples with images by Frechet and kernel distances"
    )
    memorization: MemorizationConfig | None = _part(
        MemorizationConfig(), "Memorisation", "Compare samples with their nearest training images"
    )

    @model_validator(mode="before")
    @classmethod
    def _quick_leaves_out_the_slow_parts(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("quick"):
            return data | dict.fromkeys(SLOW)
        return data


class GateConfig(Config):
    """Thresholds that a run's figures must keep, or the pipeline fails at its end. Never part of a digest."""

    min_psnr: float | None = Field(None, ge=0, le=200, description="Least psnr_test, dB; null: not asked.")
    min_top1: float | None = Field(
        None, ge=0, le=1, description="Least top1_test, a share from 0 to 1; null: not asked."
    )
    max_ece: float | None = Field(None, ge=0, le=1, description="Largest ece, a share from 0 to 1; null: not asked.")
    max_fd: float | None = Field(None, ge=0, description="Largest fd.classifier; null: not asked.")
    max_fd_latent: float | None = Field(None, ge=0, description="Largest fd.latent; null: not asked.")
    max_fd_wavelet: float | None = Field(None, ge=0, description="Largest fd.wavelet; null: not asked.")
    max_fd_efficientnet_lite0: float | None = Field(
        None, ge=0, description="Largest fd.efficientnet_lite0; null: not asked."
    )
    min_label_agreement: float | None = Field(
        None, ge=0, le=1, description="Least label_agreement.classifier, a share from 0 to 1; null: not asked."
    )
    max_fid: float | None = Field(None, ge=0, description="Largest fid; null: not asked.")
