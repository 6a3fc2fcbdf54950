"""`functa decode`, `sample` and `classify`: use the trained models of a root."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from pydantic import ValidationError

from functa.flows.cli.arguments import Functaset, Json, OutFolder, Split, functaset_of, whole
from functa.flows.cli.progress import ProgressLine
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import print_line
from functa.storage.places.address import open_location
from functa.tasks.config import SampleRequest
from functa.tasks.stage_output import stage_output

Resolution = Annotated[
    int | None,
    Parameter(
        converter=whole,
        help="Pixels a side; default: that of the images.",
        validator=validators.Number(gte=1, lte=8192),
    ),
]


def decode(
    uri: Functaset,
    *,
    rows: Annotated[
        str | None, Parameter(help="START:STOP of the split's rows; default: the first 16, or all of fewer.")
    ] = None,
    split: Split = "test",
    resolution: Resolution = None,
    out: OutFolder,
) -> int:
    """Decode latents into PNG images, at any resolution that the latent grid divides."""
    wanted = None if rows is None else _rows(rows)
    from functa.tasks.inference.decode import decode_rows

    with _interruptible(out), ProgressLine("decoding", "images") as show:
        count = decode_rows(functaset_of(uri), split, wanted, resolution, out, show)
    print_line(f"{count} images in {out}")
    return 0


def _rows(text: str) -> tuple[int, int]:
    # ASCII digits, and few enough: int() takes other digits too, and refuses thousands of them.
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--rows {text}: expected START:STOP with START < STOP, such as 0:16")
    return int(found[1]), int(found[2])


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Report on Ctrl-C where the images made so far are."""
    try:
        yield
    except KeyboardInterrupt:
        print_line(f"functa: interrupted; the images made so far are in {out}", error=True)
        sys.exit(130)


def sample(
    root: Annotated[str, Parameter(help="A run's root with a trained diffusion model.")],
    *,
    count: Annotated[int, Parameter(converter=whole, help="How many.")] = 16,
    label: Annotated[
        str | None, Parameter(help="Class of all samples, by name or number; default: the classes in turn.")
    ] = None,
    guidance: Annotated[
        float | None,
        Parameter(help="Classifier-free guidance: 0 unconditional, 1 conditional; default: that of the root's config."),
    ] = None,
    sampler: Annotated[
        Literal["ddpm", "dpmpp"] | None,
        Parameter(help="Ancestral DDPM, or DPM-Solver++ for few steps; default: that of the root's config."),
    ] = None,
    steps: Annotated[
        int | None, Parameter(converter=whole, help="Denoiser calls per sample; default: as in the root's config.")
    ] = None,
    seed: Annotated[int, Parameter(converter=whole, help="Sample i depends on seed and i alone.")] = 0,
    resolution: Resolution = None,
    out: OutFolder,
) -> int:
    """Draw samples from the diffusion model and decode them into PNG images with a contact sheet.

    Options that are not given are those of the root's config at its last evaluation, as are clipping and variance.
    """
    request = _sample_request(
        count=count, label=label, guidance=guidance, sampler=sampler, steps=steps, seed=seed, resolution=resolution
    )
    stage_output(open_location(root), "train_diffusion")
    from functa.tasks.inference.sample_images import sample_images

    with _interruptible(out), ProgressLine("sampling", "denoising steps") as show:
        drawn = sample_images(root, request, out, show)
    how = f"{drawn.process.sampler}, {drawn.process.sampling_steps} steps, guidance {drawn.process.guidance:g}"
    of = f" of the first {drawn.shown}" if drawn.shown < count else ""
    kind = f" of class {drawn.class_name}" if drawn.class_name else ""
    print_line(f"{count} images{kind} in {out} ({how}); contact sheet{of}: {drawn.sheet}")
    return 0


def _sample_request(**options: Any) -> SampleRequest:
    try:
        return SampleRequest(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--{fault['loc'][0]} {fault['input']}: {message[:1].lower()}{message[1:]}") from None


def classify(
    root: Annotated[str, Parameter(help="A run's root with a trained classifier.")],
    images: Annotated[str, Parameter(help="A folder of images, or one image.")],
    *,
    as_json: Json = False,
) -> int:
    """Classify images: the root's field encodes each, its classifier predicts. Status 1 if no file is an image."""
    stage_output(open_location(root), "train_classifier")
    from functa.tasks.inference.classify import classify_images, note_on_files

    if note := note_on_files(images):
        print_line(f"functa: {images}: {note}", error=True)
    rows = []
    for row in classify_images(root, images, note=lambda text: print_line(f"functa: {images}: {text}", error=True)):
        rows.append(row)
        if not as_json:
            from functa.flows.cli.tables import print_class

            print_class(row)
    if as_json:
        print(json.dumps(rows, indent=1))
    return 1 if all("error" in row for row in rows) else 0
