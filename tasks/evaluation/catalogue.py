"""Every figure of metrics.json: name, group, unit and meaning. Free of torch."""

from functa.tasks.evaluation import evaluators
from functa.tasks.evaluation.evaluator import Described
from functa.tasks.evaluation.generation import spaces

# What stages measure themselves; the evaluators' figures are in the table of evaluators.
STAGE_FIGURES = {
    "top1_last": Described(
        "Classification", "Top-1, last", "share", "Test accuracy after the last step.", "higher", "test"
    ),
    "top1_best": Described(
        "Classification", "Top-1, best", "share", "Best test accuracy during training (as in the paper).", "higher",
        "test",
    ),
    "bits_per_dim": Described(
        "Compression", "Bits per latent number", "bits",
        "Measured: all bytes stored for the latents over their count.", "lower",
    ),
    "clip_fraction": Described(
        "Compression", "Clipped latent numbers", "share", "Outside the quantiser's range: moved to its border.", "lower"
    ),
    "rows": Described("Data", "Rows in the functaset", "count", "Encoded images, augmentations included."),
    "bad_inputs": Described("Data", "Bad inputs", "count", "Images that could not be read and were left out.", "lower"),
    "encode_images_per_s": Described(
        "Speed", "Encoding", "rate",
        "Images encoded into latents, from the start of the first group of shards to the end of the last.",
        "higher",
    ),
    "meta_images_per_s": Described("Speed", "Meta-training", "rate", "Images processed in meta-training.", "higher"),
    "seconds_by_stage": Described("Speed", "Time", "duration", "Wall time of the stage.", "lower"),
    "parameters": Described("Models", "Parameters", "count", "Trained numbers of the model."),
    "fingerprint": Described(
        "Provenance", "Fingerprint", "text", "Digest of every setting that determines the latents."
    ),
    "versions": Described("Provenance", "Version", "text", "Version of the software that measured this."),
}  # fmt: skip

GROUPS = (
    "Reconstruction", "Classification", "Generation", "Compression", "Latents", "Data", "Speed", "Models", "Provenance",
)  # fmt: skip

BY_SPACE = (  # keys with a value for each space
    "fd", "fd_reconstruction", "fd_test", "fd_noise", "kd", "precision", "recall", "label_agreement", "probe_top1",
)  # fmt: skip

SPACES = {name: space.words for name, space in spaces.SPACES.items()}


def catalogue() -> dict[str, Described]:
    """Return the description of every figure that a run may measure, by its key in metrics.json."""
    figures: dict[str, Described] = {}
    for evaluator in evaluators.EVALUATORS:
        figures |= evaluator.figures
    return figures | STAGE_FIGURES


def described(key: str) -> Described:
    """Return the description of a first-level key of metrics.json; an unknown key is described by itself."""
    return catalogue().get(key, Described("Other", key.replace("_", " "), "plain", ""))


def groups() -> tuple[str, ...]:
    """Return the groups of figures in the order in which they are shown."""
    return (*dict.fromkeys((*GROUPS, *(figure.group for figure in catalogue().values()))), "Other")
