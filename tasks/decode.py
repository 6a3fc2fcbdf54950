"""Latents to PNG files: rows of a functaset, or fresh samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.config import DiffusionConfig, FieldConfig, InnerConfig
from models.field import Field
from models.grid import patch_shape
from models.inner import decode
from storage.errors import StorageError
from storage.functaset import Functaset
from storage.locations import Location, open_location
from storage.stages import StageRecord, output_location, read_record
from tasks.config import SampleRequest
from tasks.evaluation.job import as_uint8

SHEET_COLUMNS = 8
SHEET_SIDE = 64  # pixels that small images are enlarged to, so that a person can see them


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


def decode_rows(uri: str, split: str, rows: tuple[int, int], resolution: int | None, out: Path) -> int:
    """Writes the rows' images as PNG files named by row; returns how many."""
    functaset = Functaset.open(uri)
    present = functaset.rows(split)
    if rows[1] > present:
        raise StorageError(f"{uri}: split '{split}' has {present} rows, {rows[0]}:{rows[1]} reaches past them")
    latents = functaset.load(split).dequantized(np.arange(*rows))
    images = _decode(functaset, torch.from_numpy(latents), resolution)
    _write(images, out, [f"{split}-{row:06d}" for row in range(*rows)])
    return len(images)


def sample_images(root: str, request: SampleRequest, out: Path) -> Path:
    """Draws, decodes and writes samples and a contact sheet; returns the sheet's path.

    The process is the one in the checkpoint: sampler, steps, clipping and variance as they were when it was trained.
    """
    from tasks.sample import SampleJob, sample_latents
    from tasks.training.diffusion import describe_denoiser

    location = open_location(root)
    checkpoint_uri = stage_output(location, "train_diffusion").uri
    functaset = Functaset.open(stage_output(location, "encode"))
    meta = describe_denoiser(checkpoint_uri)
    check_same_functaset(functaset, meta, root, "diffusion model")
    chosen = {} if request.guidance is None else {"guidance": request.guidance}
    if chosen and meta["classes"] is None:
        raise StorageError(f"{root}: its diffusion model is unconditional, so it takes no --guidance")
    process = DiffusionConfig.model_validate(meta["process"] | chosen)
    labels = _labels(request, meta["classes"], root)
    job = SampleJob(
        denoiser=checkpoint_uri, process=process, seed=request.seed, start=0, labels=labels, count=request.count,
        batch=256, device="auto", output="",
    )  # fmt: skip
    images = _decode(functaset, sample_latents(job), request.resolution)
    _write(images, out, [f"sample-{i:06d}" for i in range(request.count)])
    sheet = out / "contact-sheet.png"
    contact_sheet(images).save(sheet)
    return sheet


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


def _labels(request: SampleRequest, classes: int | None, root: str) -> tuple[int, ...] | None:
    if classes is None:
        if request.label is not None:
            raise StorageError(f"{root}: its diffusion model is unconditional, so it takes no --label")
        return None
    if request.label is not None and not 0 <= request.label < classes:
        raise StorageError(f"--label {request.label}: the model has classes 0 to {classes - 1}")
    return tuple(i % classes if request.label is None else request.label for i in range(request.count))


def _decode(functaset: Functaset, z: torch.Tensor, resolution: int | None) -> np.ndarray:
    field, _, fitted = field_of(functaset)
    side = fitted if resolution is None else resolution
    try:
        patch_shape((side, side), field.config.spatial)
        field.check_resolution((side, side))
    except ValueError as error:
        raise StorageError(f"--resolution {side}: {error}") from None
    return np.concatenate([as_uint8(decode(field, part, (side, side))) for part in z.split(64)])


def _write(images: np.ndarray, out: Path, names: list[str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for image, name in zip(images, names):
            _picture(image).save(out / f"{name}.png")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def contact_sheet(images: np.ndarray, columns: int = SHEET_COLUMNS) -> Image.Image:
    """All images in rows of eight, small ones enlarged without smoothing."""
    scale = max(1, SHEET_SIDE // images.shape[1])
    height, width = images.shape[1] * scale, images.shape[2] * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * (width + 4) + 4, rows * (height + 4) + 4), (128, 128, 128))
    for i, image in enumerate(images):
        tile = _picture(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (4 + (i % columns) * (width + 4), 4 + (i // columns) * (height + 4)))
    return sheet
