"""The pieces of a campaign, in order of value: presets of the project with settings for a GPU and minutes.

Needs no torch. A piece's steps follow from the rate that a short trial measures and from its minutes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig

Kind = Literal["field", "classifier", "diffusion"]


@dataclass(frozen=True)
class Piece:
    """One training and what is measured of it."""

    row: str  # the latent, as in the paper's tables
    kind: Kind
    preset: str
    minutes: float  # of training
    others: float  # minutes for compiling, the trial, encoding and measuring
    overrides: tuple[str, ...] = ()
    most: int = 10_000_000  # steps
    whole: bool = False  # its checkpoint is too large to travel: begun only where all of it fits into a call

    @property
    def name(self) -> str:
        """Return its name in files and tables."""
        return f"{self.row}/{self.kind}"

    @property
    def needs(self) -> str | None:
        """Return the name of the piece that has to be finished before."""
        return None if self.kind == "field" else f"{self.row}/field"


# A step on 512 x 16 patches of 16 pixels, or 128 whole images: one chunk of 131,072 pixels. No validation on the way,
# which would be a second function to compile, for 45 s: the curve has the PSNR of the training batches.
GPU = (
    "inner.chunk=131072", "inner.precision=bf16", "meta_train.validation_images=0", "meta_train.log_every=20",
    "meta_train.checkpoint_seconds=30", "meta_train.warmup=200", "classifier=null", "diffusion=null",
)  # fmt: skip
MUON = ("meta_train.optimizer=muon", "meta_train.decay=cosine", "meta_train.clip_norm=1.0", "inner.rates=channel")
CLASSIFIER = (
    "encode.batch=4096", "encode.shard_rows=8192", "classifier.batch=512", "classifier.checkpoint_seconds=60",
    "diffusion=null",
)  # fmt: skip
# A tenth of the paper's parameters and a rate three times as high: minutes instead of hours.
DIFFUSION = (
    "encode.batch=4096", "encode.shard_rows=8192", "encode.augmentation.count=0", "classifier=null",
    "diffusion.model.channels=192", "diffusion.precision=bf16", "diffusion.learning_rate=3e-4",
    "diffusion.warmup=500", "diffusion.ema=0.9995", "diffusion.ema_ramp=true", "diffusion.checkpoint_seconds=60",
    "diffusion.process.sampler=dpmpp", "diffusion.process.sampling_steps=50", "evaluation.samples=10000",
    "evaluation.slice=10000", "evaluation.batch=2000",
    "evaluation.pixel_classifier={steps: 2000, batch: 256, warmup: 50, width: 64, features: 128}",
)  # fmt: skip

PIECES = (
    Piece("8x8x16", "field", "cifar10_8x8x16_fast", 3.0, 1.5, (
        *GPU, "field.width=256", "field.depth=6", "meta_train.batch=512",
    )),
    Piece("4x4x64", "field", "cifar10_4x4x64_fast", 3.5, 1.5, (*GPU, "field.width=256", "meta_train.batch=512")),
    Piece("8x8x16", "classifier", "cifar10_8x8x16_classifier", 3.5, 2.5, CLASSIFIER, whole=True),
    Piece("8x8x16", "diffusion", "paper_cifar10_8x8x16", 4.0, 3.5, DIFFUSION, whole=True),
    Piece("vector 1024", "field", "cifar10_vector_1024_classifier", 5.0, 1.5, (
        *GPU, "field.width=256", "field.depth=8", "meta_train.batch=128",
    )),
    Piece("8x8x16 bilinear", "field", "paper_cifar10_8x8x16_linear", 3.5, 1.5, (
        *GPU, *MUON, "meta_train.learning_rate=1e-3",
    )),
    Piece("4x4x64 bilinear", "field", "paper_cifar10_4x4x64_linear", 3.5, 1.5, (
        *GPU, *MUON, "meta_train.learning_rate=1e-3", "field.depth=6",
    )),
    Piece("vector 256", "field", "cifar10_vector_256_fast", 3.0, 1.5, (
        *GPU, "field.width=256", "field.depth=8", "meta_train.batch=128",
    )),
)  # fmt: skip

PAPER = {piece.row: f"paper_cifar10_{piece.row.replace(' bilinear', '_linear').replace(' ', '_')}" for piece in PIECES}

SMALL_IMAGES = 256  # of each split in a rehearsal

SMALL: Mapping[Kind, tuple[str, ...]] = {
    "field": (
        "field.width=16", "field.depth=3", "inner.chunk=1024", "meta_train.batch=8", "meta_train.log_every=1",
        "meta_train.checkpoint_seconds=1", f"images.limit={SMALL_IMAGES}",
    ),
    "classifier": (
        "encode.batch=64", "encode.shard_rows=512", "encode.augmentation.count=1", "classifier.batch=16",
        "classifier.model={width: 16, depth: 1, heads: 2}", f"images.limit={SMALL_IMAGES}",
    ),
    "diffusion": (
        "encode.batch=64", "encode.shard_rows=512", "diffusion.batch=8", f"images.limit={SMALL_IMAGES}",
        "diffusion.model={channels: 16, groups: 4, multipliers: [1], blocks: 1, head_channels: 16}",
        "diffusion.process.sampling_steps=4", "evaluation.samples=128", "evaluation.batch=64",
        "evaluation.pixel_classifier={steps: 20, batch: 32, warmup: 2, width: 8, features: 8}",
    ),
}  # fmt: skip


def rehearsal(pieces: Collection[Piece]) -> tuple[Piece, ...]:
    """Return the same pieces so small that a CPU runs all of them in a minute: a test of the session."""
    return tuple(
        replace(piece, minutes=0.03, others=0.05, overrides=piece.overrides + SMALL[piece.kind]) for piece in pieces
    )


def config_of(piece: Piece, images: str) -> PipelineConfig:
    """Return the preset with the piece's settings; raise ConfigError for settings that do not fit."""
    source = ("images={source: npz, resolution: 32, channels: 3}", f"images.location={images}")
    return load_config(piece.preset, [*source, *piece.overrides])


def minutes_left(piece: Piece, progress: Mapping[str, float]) -> float:
    """Return the estimated minutes of a piece of whose training this share is done."""
    return piece.others + piece.minutes * (1 - progress.get(piece.name, 0.0))


def choose(
    pieces: Collection[Piece],
    skipped: Collection[str],
    finished: Collection[str],
    progress: Mapping[str, float],
    minutes: float,
    least: float,
) -> Piece | None:
    """Return the most valuable piece that can be worked on in these minutes, None if there is none.

    `skipped` failed in this call; `least`: minutes without which no training gets past its start.
    """  # fmt: skip
    for piece in pieces:
        if piece.name in finished or piece.name in skipped or (piece.needs and piece.needs not in finished):
            continue
        if minutes >= (minutes_left(piece, progress) if piece.whole else least):
            return piece
    return None
