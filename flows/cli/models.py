"""`functa decode`, `sample` and `classify`: use the trained models of a root."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from pydantic import ValidationError

from functa.flows.cli.arguments import Functaset, Json, OutFolder, functaset_of, whole
from functa.flows.cli.progress import ProgressLine
from functa.flows.cli.stages import stage_command
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import print_line
from functa.models.config import Sampler
from functa.storage.places.address import open_location
from functa.tasks.config import SampleRequest
from functa.tasks.inference.photographs.store import functasets_by_size
from functa.tasks.stage_output import stage_output
from functa.tasks.stage_table import Stage

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
    split: Annotated[Literal["train", "test"] | None, Parameter(help="Which of the two splits; default: test.")] = None,
    resolution: Resolution = None,
    scale: Annotated[
        int | None,
        Parameter(
            converter=whole,
            validator=validators.Number(gte=1, lte=16),
            help="Pixels a side, as a multiple of those of the images.",
        ),
    ] = None,
    out: OutFolder,
) -> int:
    """Decode latents into PNG images, at any resolution that the latent grid divides.

    A store that `encode --field` made is decoded whole, each image at its own size.
    """
    if resolution is not None and scale is not None:
        raise ConfigError("--resolution and --scale exclude each other: leave one out")
    wanted = None if rows is None else _rows(rows)
    own = {"--rows": rows, "--split": split, "--resolution": resolution}
    if photographs := functasets_by_size(uri):
        return _decode_photographs(photographs, [name for name, value in own.items() if value], out, scale or 1)
    from functa.tasks.inference.decode import decode_rows

    with _interruptible(out), ProgressLine("decoding", "images") as show:
        count = decode_rows(functaset_of(uri), split or "test", wanted, resolution, out, show, scale or 1)
    print_line(f"{count} images in {out}")
    return 0


def _decode_photographs(uris: list[str], others: list[str], out: Path, scale: int) -> int:
    if others:
        raise ConfigError(f"{others[0]}: these images have sizes of their own and are decoded whole; use --scale alone")
    from functa.tasks.inference.photographs.decode import decode_photographs

    with _interruptible(out), ProgressLine("decoding", "images") as show:
        count = decode_photographs(uris, out, scale, show)
    print_line(f"{count} images in {out}")
    return 0


FIELD_OPTIONS: dict[str, Any] = {
    "field": Annotated[
        str | None, Parameter(help="A ready-made field (`functa fields`), or the root or the .json of one of your own.")
    ],
    "images": Annotated[str | None, Parameter(help="With --field: a folder of images of any sizes, or one image.")],
    "out": Annotated[str | None, Parameter(help="With --field: the store, a functaset for each size of images.")],
    "bits": Annotated[
        int | None,
        Parameter(
            converter=whole, validator=validators.Number(gte=1, lte=8),
            help="With --field: 1 to 8 bits a latent number; default: float32.",
        ),
    ],
    "steps": Annotated[
        int | None,
        Parameter(
            converter=whole, validator=validators.Number(gte=1, lte=100),
            help="With --field: inner steps; default: as many as the field was trained with.",
        ),
    ],
}  # fmt: skip

OPTION_OF = {"overrides": "--set", "from_root": "--from"}  # parameters whose options have another name


def encode_command(stage: Stage) -> Callable[..., int]:
    """Return the function behind `functa encode`: the stage of a preset, or a folder with a ready-made field."""
    by_preset = stage_command(stage)

    def command(preset: str | None = None, **options: Any) -> int:
        own = {name: options.pop(name, None) for name in FIELD_OPTIONS}
        if all(value is None for value in own.values()):
            if preset is None:
                raise ConfigError("encode needs PRESET, or --field, --images and --out (functa encode --help)")
            return by_preset(preset, **options)
        given = next(f"--{name}" for name, value in own.items() if value is not None)
        for name, value in {"PRESET": preset, **options}.items():
            if value:
                other = name if name == "PRESET" else OPTION_OF.get(name, f"--{name.replace('_', '-')}")
                raise ConfigError(f"{other} and {given} exclude each other: encode the images of a preset, or a folder")
        missing = [f"--{name}" for name in ("field", "images", "out") if own[name] is None]
        if missing:
            raise ConfigError(f"{given} needs {' and '.join(missing)} too (functa encode --help)")
        return _encode_photographs(**own)

    signature = inspect.signature(by_preset)
    first, *others = signature.parameters.values()
    first = first.replace(default=None, annotation=Annotated[str | None, Parameter(help="A preset, or --field.")])
    keyword = inspect.Parameter.KEYWORD_ONLY
    optional = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in FIELD_OPTIONS.items()]
    command.__name__ = stage.name
    command.__doc__ = (
        f"{stage.summary}\n\nWith --field: a folder of images, each at its own size, without any training."
    )
    command.__annotations__ = {each.name: each.annotation for each in (first, *others, *optional)} | {"return": int}
    command.__signature__ = signature.replace(parameters=[first, *others, *optional])  # type: ignore[attr-defined]
    return command


def _encode_photographs(field: str, images: str, out: str, bits: int | None, steps: int | None) -> int:
    from functa.tasks.inference.classify import note_on_files
    from functa.tasks.inference.open_models import load_ready_field
    from functa.tasks.inference.photographs.encode import encode_folder

    ready = load_ready_field(field)
    if note := note_on_files(images):
        print_line(f"functa: {images}: {note}", error=True)
    with ProgressLine("encoding", "images") as show:
        done = encode_folder(ready, images, out, bits=bits or 32, steps=steps, progress=show)
    for key, reason in done.bad.items():
        print_line(f"functa: {key}: not encoded: {reason}", error=True)
    if done.grey:
        print_line(f"functa: {done.grey} grey images became colour ones, which this field knows", error=True)
    before = f", {done.present} were there" if done.present else ""
    figures = f": PSNR {mean(done.psnr_stored):.2f} dB, {done.bits_per_pixel:.2f} bits a pixel" if done.psnr else ""
    print_line(f"{len(done.psnr)} images in {out}{before}{figures}; functa decode {out} --out FOLDER makes pictures")
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
        Sampler | None,
        Parameter(
            help="Ancestral DDPM, or DPM-Solver++ for few steps; heun for EDM and rectified flow; default: that of the "
            "root's config."
        ),
    ] = None,
    steps: Annotated[
        int | None, Parameter(converter=whole, help="Steps per sample; default: as in the root's config.")
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
