"""Configuration of everything in models/. Free of torch, so that a config error answers at once."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

# A field marked so changes how work is done, never its result: it stays out of every digest.
ENVIRONMENT: dict[str, JsonValue] = {"environment": True}

# A field marked so came after the first release: at its default it stays out of every digest, so that what earlier
# versions made is still recognised.
ADDED: dict[str, JsonValue] = {"added": True}

# A field with {ONCE: value} had this default in earlier versions, and given values meant something else: in digests its
# default is that value, and any other one is text.
ONCE = "once"


class Config(BaseModel):
    """A frozen section: unknown keys are refused, so that a misspelt one cannot pass silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def unused(self) -> set[str]:
        """Names of the keys that came after the first release and are at their defaults."""
        fields = type(self).model_fields.items()
        added = {name: info.default for name, info in fields if (info.json_schema_extra or None) == ADDED}
        return {name for name, default in added.items() if getattr(self, name) == default}


class FieldConfig(Config):
    """The neural field: a SIREN whose sine layers are shifted by modulations of a latent grid (paper section 4)."""

    spatial: int = Field(4, ge=1, le=128, description="Latent positions per side, s. 1 is vector functa.")
    channels: int = Field(16, ge=1, le=16384, description="Latent numbers per position, c.")
    width: int = Field(128, ge=4, le=4096, description="Units per sine layer.")
    depth: int = Field(5, ge=2, le=64, description="Linear layers, the output included: depth - 1 sine layers.")
    w0: float = Field(10.0, gt=0, le=1000, description="Frequency of every sine layer, sin(w0 (W h + b + m)).")
    interpolation: Literal["nearest", "bilinear"] = Field(
        "nearest", description="How modulations reach a pixel (paper section 4)."
    )
    coordinates: Literal["patch", "global", "binary"] = Field(
        "patch",
        description="[0, 1]^2 in every patch, [0, 1]^2 over the image, or the bits of the pixel's index (App. C). "
        "Where it is not given: patch for nearest, binary for bilinear.",
    )
    kernel: Literal[1, 3] = Field(1, description="Kernel of the latent-to-modulation convolution, k x k.")
    mixer: int = Field(
        0, ge=0, le=16, description="Residual blocks of 3x3 convolutions over the latent grid before the map, which "
        "let a patch see its neighbours' latents; 0: none (the paper).", json_schema_extra=ADDED,
    )  # fmt: skip
    mixer_width: int = Field(64, ge=4, le=4096, description="Channels of the mixer.", json_schema_extra=ADDED)
    axes: int = Field(2, ge=1, le=3, description="Axes of a signal: 1 audio, 2 images, 3 volumes or video.")
    pretrained: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$",
        description="A ready-made field by its name (`functa fields`), which is taken instead of training one; its own "
        "settings replace those of field and inner.",
        json_schema_extra=ADDED,
    )

    @model_validator(mode="before")
    @classmethod
    def _coordinates_go_with_interpolation(cls, data: Any) -> Any:
        if isinstance(data, dict) and "coordinates" not in data and data.get("interpolation") == "bilinear":
            return data | {"coordinates": "binary"}
        return data

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[s, s, c] for images: s once for every axis of the signal."""
        return (*[self.spatial] * self.axes, self.channels)

    @property
    def positions(self) -> int:
        """Latent positions of one signal, s^2 for images."""
        return self.spatial**self.axes

    @property
    def numbers(self) -> int:
        """Latent numbers of one signal, s^2 c for images."""
        return self.positions * self.channels

    @property
    def map_channels(self) -> int:
        """Numbers per latent position that the map takes: the latent's, or the mixer's."""
        return self.mixer_width if self.mixer else self.channels

    @property
    def gathers(self) -> bool:
        """True where the map and the interpolation reach a patch's neighbours."""
        return self.interpolation != "nearest" or self.kernel != 1

    @property
    def independent(self) -> bool:
        """True where a patch depends on its own latent alone: nearest interpolation, 1x1 map (paper section 4)."""
        return not self.gathers and not self.mixer

    @property
    def modulations(self) -> int:
        """Modulations per latent position, C = width (depth - 1)."""
        return self.width * (self.depth - 1)


class InnerConfig(Config):
    """The inner loop: gradient steps on the latent from zero, with learned rates (meta-SGD)."""

    steps: int = Field(3, ge=1, le=100, description="Inner gradient steps (the paper: 3).")
    loss: Literal["image", "patch"] = Field(
        "patch",
        description="Mean of the squared error over the image, or over one patch (s^2 times as large).",
    )
    rates: Literal["scalar", "channel", "element"] = Field(
        "channel", description="One meta-SGD rate in all, per channel, or per latent element."
    )
    rates_per_step: bool = Field(
        False, description="Rates of its own for every inner step; steps beyond take the last.", json_schema_extra=ADDED
    )
    rates_init: tuple[float, float] = Field((0.005, 0.1), description="Range of the rates' uniform start.")
    rates_clip: tuple[float, float] | None = Field(None, description="Rates are clipped to this range when used.")
    first_order: bool = Field(
        False, description="Inner gradients count as constants in the outer step (the paper differentiates them)."
    )
    precision: Literal["float32", "tf32", "bf16", "fp16"] = Field(
        "float32",
        description="Of the field's hidden matmuls (tf32: of all); the rest is float32. On a CPU tf32 is float32.",
    )
    chunk: int = Field(2048, ge=1, le=1 << 30, description="Pixels per inner-loop chunk: activations stay in cache.")
    checkpoint: bool = Field(
        False,
        description="Activation checkpointing per inner step: less memory, 19 passes instead of 15. "
        "Fields whose patches depend on each other do it wherever an image has more than inner.chunk pixels.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile: auto = when a compiler is there and the work repays it.",
        json_schema_extra=ENVIRONMENT,
    )  # fmt: skip

    @model_validator(mode="after")
    def _ordered(self) -> "InnerConfig":
        for name in ("rates_init", "rates_clip"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{name} runs from low to high, not {pair[0]} to {pair[1]}")
        return self


class NormalizationConfig(Config):
    """z' = (z - mean) / (gamma sd), moments of the training split (App. C.4.1); or z / factor (App. B.1, Table 5)."""

    kind: Literal["scalar", "vector", "array", "fixed"] = Field(
        "vector", description="Moments over everything, per channel, or per latent element; fixed: z / factor."
    )
    gamma: float = Field(1.0, gt=0, le=1000, description="Scale factor; larger gamma, smaller normalised latents.")
    factor: float = Field(
        1.0, gt=0, le=1000, description="kind=fixed: what latents are divided by (the tables' normalization scale)."
    )

    @model_validator(mode="after")
    def _one_scale(self) -> "NormalizationConfig":
        if self.kind == "fixed" and self.gamma != 1:
            raise ValueError(f"kind=fixed divides by factor alone: leave gamma at 1 instead of {self.gamma:g}")
        if self.kind != "fixed" and self.factor != 1:
            raise ValueError(f"factor={self.factor:g} is of kind=fixed, but kind={self.kind} has gamma")
        return self


class ClassifierConfig(Config):
    """Pre-LN Transformer on latent tokens (App. C), or the SiLU MLP of vector latents (App. B.1)."""

    kind: Literal["transformer", "mlp"] = Field(
        "transformer", description="A Transformer on latent tokens, or an MLP on all numbers of the latent."
    )
    width: int = Field(128, ge=8, le=8192, description="Token width; mlp: units per hidden layer.")
    depth: int = Field(4, ge=1, le=64, description="Blocks; mlp: hidden layers.")
    heads: int = Field(4, ge=1, le=64, description="transformer: attention heads.")
    mlp_ratio: float = Field(
        2.0, gt=0, le=16, description="transformer: width of the feed-forward layer over the token width."
    )
    token_channels: int | None = Field(
        None, ge=1, le=16384, description="transformer: a position's latent is cut into tokens of so many numbers, as "
        "a vector must be; null: one token per position.",
    )  # fmt: skip
    dropout: float = Field(
        0.1, ge=0, lt=1, description="transformer: once, before the head; mlp: after every hidden layer."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> "ClassifierConfig":
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.kind == "mlp" and self.token_channels is not None:
            raise ValueError("an mlp has no tokens: leave token_channels empty")
        if self.kind == "transformer" and int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio:g} of width {self.width} is no unit at all: raise mlp_ratio")
        return self


class DenoiserConfig(Config):
    """The ADM UNet on latents (Table 6), or the ResidualMLP of vector latents (App. B.1)."""

    kind: Literal["unet", "mlp"] = Field("unet", description="ADM's UNet, or residual MLP blocks for vectors.")
    channels: int = Field(64, ge=8, le=8192, description="Base channels; mlp: units per block.")
    groups: int = Field(
        32, ge=1, le=64, description="Of every group normalisation (ADM: 32); fewer keep the scale of tiny latents."
    )
    multipliers: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        (1, 2), min_length=1, max_length=6, description="unet: channel multiplier of each level, finest first."
    )
    blocks: int = Field(1, ge=1, le=64, description="Residual blocks per level; mlp: in all.")
    attention: tuple[int, ...] = Field(
        (), description="unet: latent resolutions with attention (the middle always has it)."
    )
    head_channels: int = Field(64, ge=8, le=512, description="unet: channels per attention head.")
    dropout: float = Field(0.0, ge=0, lt=1, description="In the residual blocks.")

    @model_validator(mode="after")
    def _groups_divide(self) -> "DenoiserConfig":
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} is not a multiple of groups {self.groups}")
        return self


Sampler = Literal["ddpm", "dpmpp", "heun"]

SAMPLERS: dict[str, tuple[Sampler, ...]] = {"ddpm": ("ddpm", "dpmpp"), "edm": ("heun",), "flow": ("heun",)}

DDPM_ONLY = ("timesteps", "schedule", "timestep_ratio", "weighted", "variance")

HEUN_STEPS = 18  # EDM's number for 32x32 images


class DiffusionConfig(Config):
    """Discrete-time DDPM with noise prediction (App. C, C.4); or EDM, or rectified flow."""

    kind: Literal["ddpm", "edm", "flow"] = Field(
        "ddpm", description="DDPM (the paper), EDM (Karras et al. 2022), or rectified flow (Liu et al. 2022).",
        json_schema_extra=ADDED,
    )  # fmt: skip
    sigma_data: float = Field(
        1.0, gt=0, le=1000, description="edm: standard deviation of normalised latents. Where it is not given: "
        "1 / normalization.gamma.", json_schema_extra=ADDED,
    )  # fmt: skip
    timesteps: int = Field(1000, ge=2, le=10000, description="Diffusion steps T.")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="Noise schedule.")
    timestep_ratio: float = Field(
        1.0, ge=1, le=100, description="How much likelier t = 0 is drawn than t = T, linear between (C.4.3)."
    )
    weighted: bool = Field(
        False, description="Losses are weighted by 1 / (T p(t)): unlikely timesteps count as if all were as likely."
    )
    label_drop: float = Field(0.2, ge=0, le=1, description="Share of training labels replaced by the dummy class.")
    conditional: bool = Field(True, description="Whether the denoiser sees class labels.")
    sampler: Sampler = Field(
        "ddpm", description="ddpm: ancestral (the paper), or dpmpp, DPM-Solver++ 2M, for development. edm, flow: heun."
    )
    sampling_steps: int = Field(
        1000, ge=2, le=10000, description="Steps per sample, of one denoiser call each; heun: two, but in the last. "
        f"Where it is not given: {HEUN_STEPS} for heun.",
    )  # fmt: skip
    guidance: float = Field(1.0, ge=0, le=100, description="Classifier-free guidance: 0 unconditional, 1 conditional.")
    clip: float | None = Field(None, gt=0, description="The x0 estimate is clipped to +- this; null: not clipped.")
    variance: Literal["fixed_small", "fixed_large"] = Field("fixed_large", description="Of the DDPM sampler.")

    @model_validator(mode="before")
    @classmethod
    def _sampler_goes_with_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") in ("edm", "flow"):
            return {"sampler": "heun", "sampling_steps": HEUN_STEPS} | data
        return data

    @model_validator(mode="after")
    def _of_its_kind(self) -> "DiffusionConfig":
        if self.sampler not in SAMPLERS[self.kind]:
            fitting = " or ".join(SAMPLERS[self.kind])
            steps = f" and sampling_steps={HEUN_STEPS}" if fitting == "heun" else ""
            raise ValueError(f"sampler={self.sampler} does not fit kind={self.kind}: set sampler={fitting}{steps}")
        foreign: tuple[str, ...] = DDPM_ONLY if self.kind != "ddpm" else ()
        foreign += ("sigma_data",) if self.kind != "edm" else ()
        for name in foreign:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name}={value} means nothing to kind={self.kind}: leave it at {default}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionConfig":
        if self.kind == "ddpm" and self.sampling_steps > self.timesteps:
            raise ValueError(f"sampling_steps {self.sampling_steps} exceeds timesteps {self.timesteps}")
        if not self.conditional and self.guidance != 1:
            raise ValueError("guidance needs a conditional model: set conditional=true or guidance=1")
        if self.conditional and self.label_drop == 0 and self.guidance != 1:
            raise ValueError(
                f"guidance {self.guidance:g} needs a model that saw samples without labels: set label_drop above 0, or "
                f"guidance=1"
            )
        if self.conditional and self.label_drop == 1:
            raise ValueError("label_drop=1 leaves a conditional model no labels to learn from: set conditional=false")
        return self

    @property
    def labelled(self) -> bool:
        """True where a sample is one of a class: at guidance 0 a conditional model draws unconditional ones."""
        return self.conditional and self.guidance != 0

    @property
    def calls(self) -> int:
        """Denoiser calls per sample, those without the label not counted."""
        return 2 * self.sampling_steps - 1 if self.sampler == "heun" else self.sampling_steps
