"""The table of stages: one entry describes a stage to the command, the deployments, the records and the report.

Free of torch and Prefect. CONTRIBUTING.md shows how a stage is added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from functa.tasks.config import SAMPLING_KEYS

# How samples are drawn decides what is evaluated, not what is trained.
SAMPLING = tuple(f"diffusion.process.{key}" for key in SAMPLING_KEYS)


@dataclass(frozen=True)
class Option:
    """A yes-or-no option of one stage, offered by its command and in its deployment's form."""

    help: str
    again: bool = False  # does the stage's work again even where it is up to date


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline. Its flow is the function `name` in `module`."""

    name: str  # in records, digests and metrics.json
    summary: str  # one sentence: help of the command and description of the deployment
    label: str  # heading in the report
    product: str  # noun for its output, in lineage and messages
    output: str  # folder below the root
    sections: tuple[str, ...]  # config sections whose keys decide the result
    inputs: tuple[str, ...] = ()  # stages whose outputs it reads
    optional_section: str = ""  # the config section that may be null; then the config does not have the stage
    required: tuple[str, ...] | None = None  # inputs without which it cannot run; None: all that the config has
    options: Mapping[str, Option] = field(default_factory=dict)
    # It trains a model: its flow takes `threads`, and a newer commit of its input does not outdate it.
    trains: bool = False
    queue: str = "gpu"  # a run on queue gpu waits for a free device
    module: str = "functa.flows.stages"
    leaves_out: Callable[[str], bool] = lambda key: False  # keys of its sections that do not decide the result

    @property
    def command(self) -> str:
        """Return the name of the command and of the deployment."""
        return self.name.replace("_", "-")

    @property
    def entrypoint(self) -> str:
        """Return the module path of the flow."""
        return f"{self.module}.{self.name}"


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="meta_train",
            summary="Meta-train the neural field on the training images.",
            label="Meta-train the field",
            product="field",
            output="checkpoints/field",
            trains=True,
            sections=("seed", "images", "field", "inner", "meta_train"),
        ),
        Stage(
            name="encode",
            summary="Encode every image into the functaset. Run again, it encodes only new and changed images.",
            label="Encode into a functaset",
            product="functaset",
            output="functaset.zarr",
            sections=("images", "field", "inner", "encode"),
            inputs=("meta_train",),
            options={
                "retry_bad": Option("Try the images again that could not be encoded.", again=True),
                "repair": Option("Read every object, and encode the images of damaged shards again.", again=True),
                "retire_lost": Option(
                    "Retire the rows of missing images, however many; with repair the rows of changed images too."
                ),
            },
        ),
        Stage(
            name="train_classifier",
            summary="Train the classifier on latents.",
            label="Train the classifier",
            product="classifier",
            output="checkpoints/classifier",
            trains=True,
            sections=("seed", "classifier"),
            inputs=("encode",),
            optional_section="classifier",
        ),
        Stage(
            name="train_diffusion",
            summary="Train the diffusion model on latents.",
            label="Train the diffusion model",
            product="diffusion model",
            output="checkpoints/diffusion",
            trains=True,
            sections=("seed", "diffusion"),
            inputs=("encode",),
            optional_section="diffusion",
            leaves_out=lambda key: key in SAMPLING,
        ),
        Stage(
            name="evaluate",
            summary="Measure what the finished stages produced, and write the report.",
            label="Evaluate",
            product="metrics",
            output="runs",
            sections=("seed", "images", "diffusion", "evaluation"),
            inputs=("meta_train", "encode", "train_classifier", "train_diffusion"),
            required=("meta_train", "encode"),
            # The diffusion model itself is an input, by digest.
            leaves_out=lambda key: key.startswith("diffusion.") and key not in SAMPLING,
        ),
    )
}
