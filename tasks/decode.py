"""Latents to PNG files: rows of a functaset, or fresh samples; written as they come, so that memory holds a batch."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from models.config import DiffusionConfig, FieldConfig, InnerConfig
from models.field import Field
from models.inner import decode
from storage.errors import StorageError
from storage.functaset import Functaset
from storage.locations import Location, open_location
from storage.shards import SplitShards
from storage.stages import StageRecord, output_location, read_record
from tasks.config import SAMPLING_KEYS, SampleRequest
from tasks.evaluation.job import as_uint8
from tasks.training.device import choose_device

SHEET_COLUMNS = 8
SHEET_IMAGES = 256  # at most: a sheet is one picture, held in memory
SHEET_SIDE = 64  # pixels that small images are enlarged to, so that a person can see them
LARGEST_SIDE = 256  # and large ones are reduced to
SAMPLE_BATCH = 256
DECODED_NUMBERS = 1 << 24  # pixels times channels that are decoded at a time

Decode = Callable[[Tensor], Iterator[np.ndarray]]
Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Drawn:
    """What was sampled: the contact sheet, how many images it shows, and the process that drew them."""

    sheet: Path
    shown: int
    process: DiffusionConfig


def silent(done: int, total: int) -> None:
    """Tells nobody."""


def field_of(functaset: Functaset) -> tuple[Field, InnerConfig, int]:
    """The field that lies inside a functaset, its inner loop, the resolution it was fitted at.

    So a copied functaset decodes, and encodes, alone.
    """
    tensors, described, _ = functaset.field()
    inner = InnerConfig.model_validate(described["inner"])
    fitted = (described["resolution"],) * 2
    field = Field(FieldConfig.model_validate(described["field"]), inner, described["image_channels"], resolution=fitted)
    field.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
    return field.requires_grad_(False), inner, described["resolution"]


def decode_rows(
    uri: str, split: str, rows: tuple[int, int], resolution: int | None, out: Path, progress: Progress = silent
) -> int:
    """Writes the rows' images as PNG files named by row; returns how many. Only these rows' shards are read."""
    functaset = Functaset.open(uri)
    start, stop = rows
    present = functaset.rows(split)
    if stop > present:
        raise StorageError(f"{uri}: split '{split}' has {present} rows, {start}:{stop} reaches past them")
    decoded = _decoder(functaset, resolution)
    _prepare(out)
    row = start
    for z in _read_rows(functaset, split, start, stop):
        for images in decoded(torch.from_numpy(z)):
            _write(images, out, f"{split}-", row)
            row += len(images)
            progress(row - start, stop - start)
    return row - start


def _read_rows(functaset: Functaset, split: str, start: int, stop: int) -> Iterator[np.ndarray]:
    """float32 [n, s, s, c] of each shard that has some of the rows, in the order of the store."""
    shards = SplitShards(functaset, split)
    first = 0
    for shard in shards.shards:
        here = slice(max(0, start - first), max(0, stop - first))
        if first < stop and first + shard.rows > start:
            z = shards.read(shard, ids=False).z[here]
            yield shard.quantizer.decode(z) if shard.quantizer is not None and shards.quantizers else z
        first += shard.rows


def sample_images(root: str, request: SampleRequest, out: Path, progress: Progress = silent) -> Drawn:
    """Draws, decodes and writes samples, batch by batch, and a contact sheet of the first of them.

    Sampler, steps, guidance, clipping and variance are those of the root's config, where the request names none.
    Whatever can be told to be wrong is told before the first sample is drawn.
    """
    from tasks.sample import SampleJob, sample_batches
    from tasks.training.diffusion import describe_denoiser

    location = open_location(root)
    checkpoint = stage_output(location, "train_diffusion").uri
    functaset = Functaset.open(stage_output(location, "encode"))
    meta = describe_denoiser(checkpoint)
    check_same_functaset(functaset, meta, root, "diffusion model")
    process = _process(location, meta, request, root)
    job = SampleJob(
        denoiser=checkpoint, process=process, seed=request.seed, start=0, labels=_labels(request, meta["classes"]),
        count=request.count, batch=SAMPLE_BATCH, device="auto", output="",
    )  # fmt: skip
    decoded = _decoder(functaset, request.resolution)
    _prepare(out)
    done, tiles = 0, list[Image.Image]()
    for z in sample_batches(job, progress):
        for images in decoded(z):
            _write(images, out, "sample-", done)
            tiles += [_tile(image) for image in images[: SHEET_IMAGES - len(tiles)]]
            done += len(images)
    sheet = out / "contact-sheet.png"
    _save(contact_sheet(tiles), sheet)
    return Drawn(sheet, len(tiles), process)


def stage_output(root: Location, stage: str) -> Location:
    """Where a finished stage's output is. Raises StorageError where it has not finished."""
    record: StageRecord | None = read_record(root, stage)
    # A functaset to which images are being added can be read as it was.
    going_on = record is not None and record.state == "running" and bool(record.output_digest)
    if record is None or not (record.state == "finished" or going_on):
        raise StorageError(f"{root.uri}: {stage.replace('_', '-')} has not finished there; run it first")
    return output_location(record, root)


def check_same_functaset(functaset: Functaset, meta: Mapping[str, Any], root: str, what: str) -> None:
    """Raises StorageError, naming what differs, where a model was trained on latents that mean something else.

    Later commits of the same functaset are as good.
    """
    trained, here = meta["functaset"]["fingerprint"], functaset.fingerprint
    if trained != here:
        keys = sorted(key for key in trained.keys() | here.keys() if trained.get(key) != here.get(key))
        raise StorageError(
            f"{root}: its {what} was trained on a functaset of another fingerprint ({', '.join(keys)} differ); "
            f"train it again"
        )


def _process(location: Location, meta: Mapping[str, Any], request: SampleRequest, root: str) -> DiffusionConfig:
    """The trained process, sampled as the request says, else the root's config. Raises StorageError."""
    trained, conditional = DiffusionConfig.model_validate(meta["process"]), meta["classes"] is not None
    for name in ("guidance", "label"):
        if not conditional and getattr(request, name) is not None:
            raise StorageError(f"{root}: its diffusion model is unconditional, so it takes no --{name}")
    if request.label is not None and request.label >= meta["classes"]:
        raise StorageError(f"--label {request.label}: the model has classes 0 to {meta['classes'] - 1}")
    if request.steps is not None and request.steps > trained.timesteps:
        raise StorageError(
            f"--steps {request.steps}: the model was trained on {trained.timesteps} timesteps; choose at most that"
        )
    asked = trained.model_dump() | _configured(location, trained) | request.chosen
    if conditional and asked["guidance"] != 1 and trained.label_drop == 0:
        raise StorageError(
            f"{root}: guidance {asked['guidance']:g} needs what the model makes of no label, which it never learned "
            f"(trained with label_drop=0); choose --guidance 1, or train with diffusion.process.label_drop above 0"
        )
    return DiffusionConfig.model_validate(asked)


def _configured(root: Location, trained: DiffusionConfig) -> dict[str, Any]:
    """How the root's config draws samples from this model, by the newest record that says so; empty where none does.

    Of training and evaluation, for the same model may be sampled in another manner later.
    """
    sampling = set(SAMPLING_KEYS)
    records = [record for stage in ("evaluate", "train_diffusion") if (record := read_record(root, stage))]
    for record in sorted(records, key=lambda found: found.started, reverse=True):
        section = record.pipeline.get("diffusion") or {}  # null: that run had no diffusion model
        try:
            process = DiffusionConfig.model_validate(section["process"])
        except (KeyError, ValidationError):  # of a version that recorded something else
            continue
        if process.model_dump(exclude=sampling) == trained.model_dump(exclude=sampling):
            return process.model_dump(include=sampling)
    return {}


def _labels(request: SampleRequest, classes: int | None) -> tuple[int, ...] | None:
    if classes is None:
        return None
    return tuple(i % classes if request.label is None else request.label for i in range(request.count))


def _decoder(functaset: Functaset, resolution: int | None) -> Decode:
    """From latents [n, s, s, c] to images uint8 [m, H, W, ch], some at a time. Raises StorageError at once."""
    field, _, fitted = field_of(functaset)
    side = fitted if resolution is None else resolution
    try:
        field.check_resolution((side, side))
    except ValueError as error:
        raise StorageError(f"--resolution {side}: {error}") from None
    if side % field.config.spatial:
        raise StorageError(
            f"--resolution {side}: is not divisible into {field.config.spatial} latent positions a side; "
            f"choose a multiple of {field.config.spatial}"
        )
    device = choose_device("auto")
    field = field.to(device)
    size = min(SAMPLE_BATCH, max(1, DECODED_NUMBERS // (side * side * field.image_channels)))

    def decoded(z: Tensor) -> Iterator[np.ndarray]:
        for part in z.split(size):
            yield as_uint8(decode(field, part.to(device), (side, side)).cpu())

    return decoded


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Around what writes: a full disk or a forbidden folder is one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None


def _prepare(out: Path) -> None:
    """Makes the folder. Raises StorageError where no file can be written there."""
    with _told(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def _write(images: Iterable[np.ndarray], out: Path, name: str, first: int) -> None:
    for number, image in enumerate(images, start=first):
        _save(_picture(image), out / f"{name}{number:06d}.png")


def _save(picture: Image.Image, path: Path) -> None:
    """All of the file at once, so that an interruption leaves no half of one."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with _told(path.parent):
        path.write_bytes(buffer.getvalue())


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _tile(image: np.ndarray) -> Image.Image:
    """An image as the sheet shows it: a small one enlarged without smoothing, a large one reduced."""
    side, picture = image.shape[0], _picture(image).convert("RGB")
    if side > LARGEST_SIDE:
        return picture.resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    wanted = side * max(1, SHEET_SIDE // side)
    return picture.resize((wanted, wanted), Image.Resampling.NEAREST)


def contact_sheet(tiles: Sequence[Image.Image], columns: int = SHEET_COLUMNS) -> Image.Image:
    """Pictures of one size in rows of eight."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * (width + 4) + 4, rows * (height + 4) + 4), (128, 128, 128))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (4 + (i % columns) * (width + 4), 4 + (i // columns) * (height + 4)))
    return sheet
