"""Configuration of everything in storage/. Free of zarr and PIL, so that a config error answers at once."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from functa.storage.images.sources import IMAGE_SOURCES, find_source


class Config(BaseModel):
    """A frozen section: unknown keys are refused, so that a misspelt one cannot pass silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _known_source(name: str) -> str:
    find_source(name)
    return name


class ImagesConfig(Config):
    """The source of the images. Every source has a training and a test split and integer labels."""

    source: Annotated[
        str, AfterValidator(_known_source), WithJsonSchema({"type": "string", "enum": list(IMAGE_SOURCES)})
    ] = Field("digits", description=f"{'; '.join(f'{n}: {s.description}' for n, s in IMAGE_SOURCES.items())}.")
    location: str = Field(
        "", description="Folder, .npz file, or shards (webdataset, parquet), local or s3://; a pattern as in "
        "train-{000..127}.tar, *.parquet or imagenet/{train,val} names some of them.",
    )  # fmt: skip
    labels: str = Field(
        "", description="Table of file and label (.csv, .tsv, .jsonl) of images that lie in no class folders; none: no "
        "classes, whatever there is.",
    )  # fmt: skip
    columns: str = Field(
        "", description="IMAGE,LABEL: columns of a table; of a tar, the label's field in "
        "its .json; without it: image and label, or the only ones that fit.",
    )  # fmt: skip
    dataset: Literal["CIFAR10", "FashionMNIST"] = Field("CIFAR10", description="Which torchvision data set.")
    channels: Literal[1, 3] | None = Field(None, description="Grey or RGB; null: what the source has (folder: 3).")
    classes: int | None = Field(None, ge=1, description="How many classes; null: what the source has.")
    resolution: int | None = Field(
        None, ge=2, le=4096, description="Short side to this, then centre crop; null: images must agree already."
    )
    limit: int | None = Field(None, ge=1, description="At most this many images per split, spread over the classes.")
    test_fraction: float = Field(
        300 / 1797, gt=0, lt=1, description="Share held out, where the source has no test split."
    )
    split_seed: int = Field(0, ge=0, le=2**31 - 1, description="Of the split into training and test images.")
    split: Literal["by_key", "stratified"] = Field(
        "by_key", description="by_key: an image's key alone decides whether it is a test image, so that this never "
        "changes; stratified: that share of each class, which other images can change, as in roots made before there "
        "was a choice.",
    )  # fmt: skip
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="More unreadable images of a split than this share fail the run; 3 always pass, "
        "or 1 of less than 30. 0: not one may be unreadable.",
        json_schema_extra={"environment": True},
    )  # fmt: skip
    max_gone_fraction: float = Field(
        0.1, ge=0, le=1, description="Encoding stops if over this share of encoded images or a whole class is missing.",
        json_schema_extra={"environment": True},
    )  # fmt: skip
    max_pixels: int = Field(
        50_000_000, ge=1, le=1_000_000_000, description="Larger images are refused from their header, before decoding."
    )
    decoder: Literal["exact", "fast"] = Field(
        "exact", description="exact: decoded whole, resized by Pillow; fast: 2 to 7 times as many photographs a "
        "second: large JPEGs at a fraction of their resolution where that is enough. Pixels agree to 40 to 55 dB.",
    )  # fmt: skip

    def decides(self, name: str) -> bool:
        """Return whether a setting decides which images there are. Older records have not all of them."""
        if name == "labels":  # a table may be moved; labels themselves are compared image by image
            return self.labels == "none"
        if name == "columns":
            return bool(self.columns)
        if name == "decoder":
            return self.decoder != "exact"
        return name != "split" or (self.split == "by_key" and "split" in find_source(self.source).settings)

    @model_validator(mode="after")
    def _fits_the_source(self) -> "ImagesConfig":
        find_source(self.source).check(self.source, self)
        if self.columns and (self.columns.count(",") != 1 or "" in self.columns.split(",")):
            raise ValueError(f"columns={self.columns}: expected IMAGE,LABEL, such as img,label")
        return self


class QuantizationConfig(Config):
    """Uniform quantisation of latents, 2^bits bins per latent dimension (App. C.4.4)."""

    bits: int = Field(32, ge=1, le=32, description="1 to 8 bits per latent number; 32 stores float32.")
    range: Literal["minmax", "sigma", "quantile", "auto"] = Field(
        "minmax", description="Range of the bins, from the calibration images; auto: the one of best PSNR on them."
    )
    sigma: float = Field(6.0, gt=0, le=100, description="range=sigma: mean +- this many standard deviations.")
    quantile: float = Field(0.001, gt=0, lt=0.5, description="range=quantile: from this quantile to one minus it.")
    granularity: Literal["scalar", "channel", "element"] = Field(
        "element", description="One range in all, per channel, or per latent element (the paper)."
    )
    codec: Literal["zstd", "exact"] = Field(
        "zstd", description="zstd entropy codes the bins; exact stores exactly `bits` bits (blosc bit-shuffle)."
    )
    margin: float = Field(0.1, ge=0, le=10, description="range=minmax: widened by this share at both ends.")
    max_clip_fraction: float = Field(
        0.01, ge=0, le=1, description="More latent numbers than this share outside the range refuse an encoding.",
        json_schema_extra={"environment": True},
    )  # fmt: skip

    @model_validator(mode="after")
    def _bits(self) -> "QuantizationConfig":
        if 8 < self.bits < 32:
            raise ValueError(f"bits is 1 to 8, or 32 for float32, not {self.bits}")
        return self
