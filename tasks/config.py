"""Configuration of training, encoding and dispatch. Does not import torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from functa.models.config import (
    ADDED,
    ENVIRONMENT,
    ClassifierConfig,
    Config,
    DenoiserConfig,
    DiffusionConfig,
    NormalizationConfig,
    Sampler,
)
from functa.storage.config import QuantizationConfig

# Keys of diffusion.process that decide how samples are drawn, and are not part of the trained model.
SAMPLING_KEYS = ("sampler", "sampling_steps", "guidance", "clip", "variance")

MEMORY_BYTES = 4 << 30  # largest size of a split's pixels that training keeps in memory; others are read on demand


MUON_FACTOR: float = Field(3.0, gt=0, le=100, description="Muon's learning rate over Adam's.")


class TrainingConfig(Config):
    """Settings of every training run: length, optimiser, how often it logs and saves."""

    steps: int = Field(1000, ge=1, le=10_000_000, description="Optimiser steps.")
    batch: int = Field(64, ge=1, le=65536, description="Examples per step, over all devices.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Peak learning rate.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        "constant", description="Learning rate after the warm-up: constant, cosine to zero, or peak sqrt(warmup/step)."
    )
    clip_norm: float | None = Field(None, gt=0, description="Global gradient norm is clipped to this.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of the averaged weights; 0: none.")
    ema_ramp: bool = Field(
        False, description="The decay grows as (1 + step) / (10 + step) up to ema: else short runs average their start."
    )
    log_every: int = Field(20, ge=1, description="Steps between lines of metrics.jsonl.", json_schema_extra=ENVIRONMENT)
    checkpoint_seconds: float = Field(
        60, gt=0, description="Seconds between checkpoints.", json_schema_extra=ENVIRONMENT
    )

    @model_validator(mode="after")
    def _decays_from_a_warmup(self) -> "TrainingConfig":
        if self.decay == "inverse_sqrt" and not self.warmup:
            raise ValueError("decay inverse_sqrt starts at the end of the warm-up: set warmup to at least 1 step")
        return self

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "TrainingConfig":
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} exceeds steps {self.steps}: set warmup to at most {self.steps}")
        return self


class MetaTrainConfig(TrainingConfig):
    """Outer loop: Adam on the field, the modulation map and the meta-SGD rates (paper section 4, App. C.1)."""

    batch: int = Field(16, ge=1, le=65536, description="Images per outer step, over all devices.")
    optimizer: Literal["adam", "muon"] = Field(
        "adam", description="Adam (the paper), or Muon on hidden weights and modulation map and Adam on the rest."
    )
    muon_factor: float = MUON_FACTOR
    rates_factor: float = Field(
        1.0, gt=0, le=10000, description="Learning rate of the inner loop's rates, over that of the weights.",
        json_schema_extra=ADDED,
    )  # fmt: skip
    patches_per_image: int | None = Field(
        None, ge=1, description="Random patches of every image that a step trains on; null: all. Nearest and 1x1 only."
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Images per backward pass, their gradients accumulated; null: the whole batch.",
    )
    validation_images: int = Field(
        64, ge=0, le=100_000, description="Test images whose PSNR is logged during training."
    )
    validate_every: int = Field(500, ge=1, description="Steps between validations.", json_schema_extra=ENVIRONMENT)


class AugmentationConfig(Config):
    """Augmented training images, each stored as a row of its own beside the plain image's (App. B.1 and C.1)."""

    count: int = Field(0, ge=0, le=10_000, description="Augmentations of each training image (paper, CIFAR-10: 50).")
    kind: Literal["crop", "distort"] = Field(
        "crop", description="crop: pad with zeros, crop to the image's size (CIFAR-10); distort: resize a random box "
        "of another shape (ImageNet).",
    )  # fmt: skip
    flip: float = Field(0.5, ge=0, le=1, description="Share of images that is mirrored left to right.")
    padding: int = Field(4, ge=0, le=512, description="kind=crop: pixels of zeros added at every border.")
    area: tuple[float, float] = Field(
        (0.05, 1.0), description="kind=distort: area of the box, as a share of the image."
    )
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="kind=distort: width of the box over its height.")
    operations: int = Field(0, ge=0, le=14, description="RandAugment operations that follow (paper, ImageNet: 2).")
    magnitude: float = Field(5.0, ge=0, le=10, description="Their magnitude, of 10 (paper, ImageNet: 5).")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="An augmentation depends on this, the image and its number.")

    @model_validator(mode="after")
    def _in_order(self) -> "AugmentationConfig":
        for name, (low, high) in (("area", self.area), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} {low} to {high} is not a range of positive numbers")
        if self.area[1] > 1:
            raise ValueError(f"area {self.area[1]} is more than the image")
        return self

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the settings that determine the augmented images; empty if there are none."""
        if self.count == 0:
            return {}
        unused = {"area", "ratio"} if self.kind == "crop" else {"padding"}
        return self.model_dump(mode="json", exclude=unused | ({"magnitude"} if self.operations == 0 else set()))


class EncodeConfig(Config):
    """Encoding of every image into a latent, which is stored in the functaset."""

    batch: int = Field(256, ge=1, le=65536, description="Images encoded at a time.", json_schema_extra=ENVIRONMENT)
    shard_rows: int = Field(1024, ge=1, le=1 << 20, description="Rows per shard: the unit of work and of writing.")
    chunk_rows: int = Field(256, ge=1, le=1 << 20, description="Rows per chunk inside a shard.")
    group_shards: int = Field(
        4,
        ge=1,
        le=65536,
        description="Shards per dispatched task; more where there would be over 500 tasks.",
        json_schema_extra=ENVIRONMENT,
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Inner gradient steps of encoding; null: inner.steps. The report shows whether more help.",
        json_schema_extra=ADDED,
    )
    calibration_images: int = Field(
        512, ge=1, le=1 << 20, description="Training images that set the quantiser's range."
    )
    augmentation: AugmentationConfig = Field(AugmentationConfig(), title="Augmentation")
    quantization: QuantizationConfig = Field(QuantizationConfig(), title="Quantization")

    @model_validator(mode="after")
    def _chunks_fill_shards(self) -> "EncodeConfig":
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")
        return self


class LatentTrainingConfig(TrainingConfig):
    """Settings of both trainings on latents."""

    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32",
        description="Precision of matmuls and convolutions, by autocast; weights and optimiser stay float32.",
    )
    compile: Literal["auto", "on", "graphs", "off"] = Field(
        "auto",
        description="torch.compile: auto = if there is a compiler and the run is long enough; graphs: CUDA graphs too.",
        json_schema_extra=ENVIRONMENT,
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Examples per backward pass and device, their gradients accumulated; null: all at once.",
        json_schema_extra=ENVIRONMENT,
    )


class TrainClassifierConfig(LatentTrainingConfig):
    """Classifier on latents (App. C). An epoch uses every image once, plain or in a stored augmentation."""

    optimizer: Literal["adam", "muon"] = Field(
        "adam", description="AdamW (the paper), or Muon on hidden matrices and AdamW on the rest."
    )
    muon_factor: float = MUON_FACTOR
    weight_decay: float = Field(0.1, ge=0, le=10, description="Weight decay of AdamW, for matrices only.")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing.")
    noise: float = Field(
        0.0, ge=0, le=10, description="Standard deviation of Gaussian noise on normalised latents in training."
    )
    evaluate_every: int = Field(250, ge=1, description="Steps between test accuracies, of which the best is reported.")
    normalization: NormalizationConfig = Field(NormalizationConfig(), title="Normalization")
    model: ClassifierConfig = Field(ClassifierConfig(), title="Classifier model")


class TrainDiffusionConfig(LatentTrainingConfig):
    """Diffusion model on latents (App. C)."""

    normalization: NormalizationConfig = Field(NormalizationConfig(), title="Normalization")
    process: DiffusionConfig = Field(DiffusionConfig(), title="Diffusion process")
    model: DenoiserConfig = Field(DenoiserConfig(), title="Denoiser model")

    @field_validator("process")
    @classmethod
    def _spread_of_latents(cls, process: DiffusionConfig, info: ValidationInfo) -> DiffusionConfig:
        normalization: NormalizationConfig | None = info.data.get("normalization")
        if process.kind != "edm" or "sigma_data" in process.model_fields_set or normalization is None:
            return process
        if normalization.kind == "fixed":
            raise ValueError(
                f"kind=edm needs the standard deviation of normalised latents, which division by "
                f"factor={normalization.factor:g} does not give: set sigma_data, or another normalization.kind"
            )
        return process.model_copy(update={"sigma_data": 1 / normalization.gamma})


class DispatchConfig(Config):
    """Devices, workers and retries of tasks. Not part of any digest."""

    runner: Literal["threads", "prefect", "dask"] = Field(
        "threads",
        description="Who encodes, samples and evaluates: threads of one process, all workers of the server's pool "
        "(prefect), or a Dask cluster.",
    )
    workers: int = Field(
        1,
        ge=1,
        le=1024,
        description="Groups of work at once: threads, or Dask workers on this machine, one GPU each; runner=prefect: "
        "as many as the pool has workers.",
    )
    address: str | None = Field(
        None,
        pattern=r"^(tcp|tls|ucx|ws|wss)://[^\s/@]+$",
        description="runner=dask: the scheduler of an existing cluster; null: workers on this machine.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one.")
    devices: int = Field(
        1, ge=1, le=64, description="Training processes on each machine (torchrun); batches are split."
    )
    nodes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Machines that train together; batches are split over all. runner=prefect: workers of the pool; "
        "else the same command on each.",
    )
    rendezvous: str | None = Field(
        None,
        pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d{1,5}$",
        description="nodes > 1: HOST:PORT of the first machine, on a network that only they reach; runner=prefect: it "
        "chooses its own.",
    )
    hydrate: bool = Field(
        False, description="Trainings copy a functaset that does not fit into memory to the machine's own disk first: "
        "into FUNCTA_HYDRATED, or ~/.cache/functa/hydrated.",
    )  # fmt: skip
    retries: int = Field(2, ge=0, le=50, description="Retries of a failed task.")
    retry_delay: float = Field(2.0, ge=0, le=3600, description="Seconds before a retry, doubled each time.")

    @property
    def trains_on_pool(self) -> bool:
        """Return whether each node of a training is a run of the pool."""
        return self.runner == "prefect" and self.nodes > 1

    @model_validator(mode="after")
    def _place_to_meet(self) -> "DispatchConfig":
        if self.nodes > 1 and self.rendezvous is None and not self.trains_on_pool:
            raise ValueError(
                f"nodes {self.nodes} need rendezvous: HOST:PORT of the first machine and a free port there; or "
                f"runner=prefect, with which they are workers of the pool"
            )
        if self.trains_on_pool and self.rendezvous is not None:
            raise ValueError(
                f"rendezvous {self.rendezvous}: with runner=prefect the pool chooses the first of {self.nodes} nodes, "
                f"and that its address: leave rendezvous out, or choose another runner and start each node yourself"
            )
        return self

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> "DispatchConfig":
        if self.address is not None and self.runner != "dask":
            raise ValueError(f"address {self.address} is a Dask scheduler's, but runner is {self.runner}")
        # Whoever answers there sends pickles, and who can send one runs code in this process.
        if self.address is not None and not re.match(r"tls://|tcp://(127\.0\.0\.1|localhost|\[::1\]):", self.address):
            raise ValueError(
                f"address {self.address}: only tls:// addresses are connected to, or tcp:// ones of this machine "
                f"(tcp://127.0.0.1:PORT)"
            )
        return self


class SampleRequest(Config):
    """A request for samples."""

    count: int = Field(ge=1)
    label: Annotated[int, Field(ge=0)] | str | None = None  # a class's number, or its name
    guidance: float | None = None
    sampler: Sampler | None = None
    steps: int | None = None
    seed: int = Field(0, ge=0)
    resolution: int | None = Field(None, ge=1)

    @field_validator("guidance")
    @classmethod
    def _guidance(cls, value: float | None) -> float | None:
        return value if value is None else DiffusionConfig(guidance=value).guidance

    @field_validator("steps")
    @classmethod
    def _steps(cls, value: int | None) -> int | None:
        # Only the model knows its number of timesteps.
        return value if value is None else DiffusionConfig(timesteps=10_000, sampling_steps=value).sampling_steps

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the requested keys of the diffusion process."""
        asked = {"guidance": self.guidance, "sampler": self.sampler, "sampling_steps": self.steps}
        return {key: value for key, value in asked.items() if value is not None}


class PixelClassifierConfig(TrainingConfig):
    """Small convolutional network on pixels, trained by the pipeline: a feature space for Frechet distances."""

    steps: int = Field(400, ge=1, le=1_000_000, description="Optimiser steps.")
    batch: int = Field(128, ge=1, le=65536, description="Images per step.")
    warmup: int = Field(50, ge=0, description="Steps of linear warm-up.")
    decay: Literal["constant", "cosine"] = Field("cosine", description="Learning rate after the warm-up.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="Weight decay of AdamW, for matrices only.")
    width: int = Field(32, ge=4, le=1024, description="Channels of the first convolution.")
    features: int = Field(64, ge=2, le=4096, description="Penultimate features.")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Its own seed, so that runs of several seeds are measured in the same space."
    )
