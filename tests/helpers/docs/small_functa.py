"""The `functa` command as the pages' tests call it: a preset's run takes seconds instead of minutes.

Everything else reaches the command as it is written on the page.
"""

import sys
from pathlib import Path

from functa.flows.cli.main import main

SMALL = {
    "photos_64": (
        "images.limit=24", "field.width=16", "field.depth=3", "inner.precision=float32", "inner.compile=off",
        "meta_train.steps=2", "meta_train.warmup=0", "meta_train.patches_per_image=4", "meta_train.validation_images=2",
        "encode.calibration_images=16", "encode.quantization.max_clip_fraction=1",
        "diffusion.steps=2", "diffusion.warmup=0", "diffusion.model.channels=16",
        "diffusion.model.head_channels=16", "diffusion.process.sampling_steps=2",
        "evaluation.samples=4", "evaluation.memorization=null", "evaluation.compression.images=2",
        "evaluation.pixel_classifier.steps=2", "evaluation.pixel_classifier.warmup=0",
        "evaluation.perturbation.images=1", "evaluation.perturbation.positions=1",
        "evaluation.perturbation.channels=1",
    ),
}  # fmt: skip


def small(arguments: list[str], folder: Path) -> list[str]:
    """Return the arguments with settings that make their preset small.

    `digits` becomes the configuration of the root in `folder`, if there is one: what is finished there stays valid.
    """
    if len(arguments) < 2 or arguments[0] in ("show", "presets"):
        return arguments
    configs = sorted(folder.glob("functa-runs/digits/runs/*/config.yaml"))
    if arguments[1] == "digits" and configs:
        return [arguments[0], str(configs[0]), *arguments[2:]]
    settings = SMALL.get(arguments[1], ())
    return [*arguments, *(part for setting in settings for part in ("--set", setting))]


if __name__ == "__main__":
    sys.argv[1:] = small(sys.argv[1:], Path.cwd())
    main()
