"""Draw samples from a root's diffusion model and write them as images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import ValidationError

from functa.models.config import DiffusionConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record
from functa.tasks.config import SAMPLING_KEYS, SampleRequest
from functa.tasks.inference.decode import SAMPLE_BATCH, Decode, Progress, decoder, silent
from functa.tasks.inference.png import SHEET_IMAGES, contact_sheet, prepare_folder, save_png, tile, write_images
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import check_same_functaset

if TYPE_CHECKING:  # it loads diffusers
    from functa.tasks.inference.sample import SampleJob


@dataclass(frozen=True)
class Drawn:
    """The result of sampling: the contact sheet, how many images it shows, and the process that drew them."""

    sheet: Path
    shown: int
    process: DiffusionConfig


def sample_images(root: str, request: SampleRequest, out: Path, progress: Progress = silent) -> Drawn:
    """Draw, decode and write samples, batch by batch, and a contact sheet of the first of them.

    Sampler, steps, guidance, clipping and variance are those of the root's config, unless the request names others.
    Raises StorageError for every fault that can be found before the first sample is drawn.
    """
    from functa.tasks.inference.sample import sample_batches

    job, decoded = prepare_samples(root, request)
    prepare_folder(out)
    done, tiles = 0, list[Image.Image]()
    for z in sample_batches(job, progress):
        for images in decoded(z):
            write_images(images, out, "sample-", done)
            tiles += [tile(image) for image in images[: SHEET_IMAGES - len(tiles)]]
            done += len(images)
    sheet = out / "contact-sheet.png"
    save_png(contact_sheet(tiles), sheet)
    return Drawn(sheet, len(tiles), job.process)


def prepare_samples(root: str, request: SampleRequest, device: str = "auto") -> "tuple[SampleJob, Decode]":
    """Return the job that draws the request's latents, and their decoder. Raises StorageError."""
    from functa.tasks.inference.sample import SampleJob
    from functa.tasks.trained import describe_denoiser

    location = open_location(root)
    checkpoint = stage_output(location, "train_diffusion").uri
    functaset = Functaset.open(stage_output(location, "encode"))
    meta = describe_denoiser(checkpoint)
    check_same_functaset(functaset, meta, root, "diffusion model")
    job = SampleJob(
        denoiser=checkpoint, process=_process(location, meta, request, root), seed=request.seed, start=0,
        labels=_labels(request, meta["classes"]), count=request.count, batch=SAMPLE_BATCH, device=device, output="",
    )  # fmt: skip
    return job, decoder(functaset, request.resolution, device)


def _process(location: Location, meta: Mapping[str, Any], request: SampleRequest, root: str) -> DiffusionConfig:
    """Return the trained process with the request's sampling settings, else those of the root's config."""
    trained, conditional = DiffusionConfig.model_validate(meta["process"]), meta["classes"] is not None
    for name in ("guidance", "label"):
        if not conditional and getattr(request, name) is not None:
            raise StorageError(f"{root}: its diffusion model is unconditional, so it takes no {name}")
    if request.label is not None and request.label >= meta["classes"]:
        raise StorageError(f"label {request.label}: the model has classes 0 to {meta['classes'] - 1}")
    if request.steps is not None and request.steps > trained.timesteps:
        raise StorageError(
            f"steps {request.steps}: the model was trained on {trained.timesteps} timesteps; choose at most that"
        )
    asked = trained.model_dump() | _configured(location, trained) | request.chosen
    if conditional and asked["guidance"] != 1 and trained.label_drop == 0:
        raise StorageError(
            f"{root}: guidance {asked['guidance']:g} needs predictions without a label, which the model never learned "
            f"(trained with label_drop=0); choose guidance 1, or train with diffusion.process.label_drop above 0"
        )
    return DiffusionConfig.model_validate(asked)


def _configured(root: Location, trained: DiffusionConfig) -> dict[str, Any]:
    """Return the sampling settings of the newest record of this model; empty if there is none.

    Records of training and evaluation count, since a model may later be sampled with other settings.
    """
    sampling = set(SAMPLING_KEYS)
    records = [record for stage in ("evaluate", "train_diffusion") if (record := read_record(root, stage))]
    for record in sorted(records, key=lambda found: found.started, reverse=True):
        section = record.pipeline.get("diffusion") or {}  # null: that run had no diffusion model
        try:
            process = DiffusionConfig.model_validate(section["process"])
        except (KeyError, ValidationError):  # written by another version
            continue
        if process.model_dump(exclude=sampling) == trained.model_dump(exclude=sampling):
            return process.model_dump(include=sampling)
    return {}


def _labels(request: SampleRequest, classes: int | None) -> tuple[int, ...] | None:
    if classes is None:
        return None
    return tuple(i % classes if request.label is None else request.label for i in range(request.count))
