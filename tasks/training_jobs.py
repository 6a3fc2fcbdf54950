"""The jobs of training processes, as a process receives them on standard input. Free of torch."""

import os
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from functa.models.config import Config, FieldConfig, InnerConfig
from functa.storage.config import ImagesConfig
from functa.storage.errors import FunctaError
from functa.tasks.config import (
    DispatchConfig,
    MetaTrainConfig,
    PixelClassifierConfig,
    TrainClassifierConfig,
    TrainDiffusionConfig,
    TrainingConfig,
)

WAIT_SECONDS = 600.0  # of a machine for the others that train with it

NODE = ("FUNCTA_NODE", "SLURM_NODEID")  # environment variables: the number of this machine


class TrainingJob(Config):
    """Job of a training process: what all kinds of training have in common."""

    what: ClassVar[str]  # noun for people

    kind: str  # name of the config section that describes the training
    seed: int
    device: str
    devices: int = 1  # processes on each machine
    nodes: int = 1  # machines that train together
    node: int = 0  # number of this machine among them
    rendezvous: str | None = None  # HOST:PORT of the first of them, where the others find it
    output: str  # URI of the folder of checkpoints
    digest: str  # of everything that decides the weights: a checkpoint of another digest is not resumed

    @property
    def training(self) -> TrainingConfig:
        """Return the settings of the training loop."""
        section: TrainingConfig = getattr(self, self.kind)
        return section


class MetaTrainJob(TrainingJob):
    """One meta-training run."""

    what: ClassVar[str] = "the field"

    kind: Literal["meta_train"] = "meta_train"
    images: ImagesConfig
    field: FieldConfig
    inner: InnerConfig
    meta_train: MetaTrainConfig


class LatentJob(TrainingJob):
    """A training run on the latents of a functaset."""

    functaset: str  # URI
    version: int | None = None  # number of the commit; None: the newest
    classes: int
    class_names: tuple[str, ...] = ()
    hydrate: bool = False  # copy what does not fit into memory to this machine's disk


class ClassifierJob(LatentJob):
    """One training run of a classifier."""

    what: ClassVar[str] = "the classifier"

    kind: Literal["classifier"] = "classifier"
    classifier: TrainClassifierConfig


class DiffusionJob(LatentJob):
    """One training run of a diffusion model."""

    what: ClassVar[str] = "the diffusion model"

    kind: Literal["diffusion"] = "diffusion"
    diffusion: TrainDiffusionConfig


class PixelClassifierJob(TrainingJob):
    """One training run of the classifier on pixels."""

    what: ClassVar[str] = "the pixel classifier"

    kind: Literal["pixel_classifier"] = "pixel_classifier"
    images: ImagesConfig
    pixel_classifier: PixelClassifierConfig


AnyJob = Annotated[MetaTrainJob | ClassifierJob | DiffusionJob | PixelClassifierJob, Field(discriminator="kind")]

JOBS: TypeAdapter[MetaTrainJob | ClassifierJob | DiffusionJob | PixelClassifierJob] = TypeAdapter(AnyJob)


def this_node(dispatch: DispatchConfig) -> int:
    """Return the number of this machine among those that train together, 0 the first one, from the environment.

    Where the nodes are runs of a pool it is 0: this machine's run waits for them, or receives its number in its job.
    Raises FunctaError for a number that there is not.
    """
    name, nodes = next((name for name in NODE if os.environ.get(name)), None), dispatch.nodes
    if nodes == 1 or name is None or dispatch.trains_on_pool:
        return 0
    number = os.environ[name]
    if not number.isdecimal() or int(number) >= nodes:
        raise FunctaError(f"{name}={number}: dispatch.nodes={nodes} has numbers 0 to {nodes - 1}; set one of them")
    return int(number)
