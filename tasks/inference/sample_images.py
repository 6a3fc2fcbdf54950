"""Draw samples from a root's diffusion model and write them as images."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from pydantic import ValidationError

from functa.models.config import SAMPLERS, DiffusionConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record
from functa.storage.runs.weights import read_description
from functa.tasks.config import SAMPLING_KEYS, SampleRequest
from functa.tasks.inference.decode import SAMPLE_BATCH, Decode, Progress, decoder, silent
from functa.tasks.inference.png import SHEET_IMAGES, contact_sheet, prepare_folder, save_png, tile, write_images
from functa.tasks.stage_output import stage_output
from functa.tasks.trained import check_same_functaset

if TYPE_CHECKING:  # it loads diffusers
    from functa.tasks.inference.sample import SampleJob


@dataclass(frozen=True)
class Drawn:
    """The result of sampling: the contact sheet, how many images it shows, the process that drew them, their class."""

    sheet: Path
    shown: int
    process: DiffusionConfig
    class_name: str  # of all of them; empty: the classes in turn, or an unconditional model


def sample_images(root: str, request: SampleRequest, out: Path, progress: Progress = silent) -> Drawn:
    """Draw, decode and write samples, batch by batch, and a contact sheet of the first of them.

    Sampler, steps, guidance, clipping and variance are those of the root's config, unless the request names others.
    Raises StorageError for every fault that can be found before the first sample is drawn.
    """
    from functa.tasks.inference.sample import sample_batches

    prepared = prepare_samples(root, request)
    prepare_folder(out)
    done, tiles = 0, list[Image.Image]()
    for z in sample_batches(prepared.job, progress):
        for images in prepared.decoded(z):
            write_images(images, out, "sample-", done)
            tiles += [tile(image) for image in images[: SHEET_IMAGES - len(tiles)]]
            done += len(images)
    sheet = out / "contact-sheet.png"
    save_png(contact_sheet(tiles), sheet)
    return Drawn(sheet, len(tiles), prepared.job.process, prepared.class_name)


class Prepared(NamedTuple):
    """The job that draws latents, their decoder, and the name of the one class of all, or an empty string."""

    job: "SampleJob"
    decoded: Decode
    class_name: str


def prepare_samples(root: str, request: SampleRequest, device: str = "auto") -> Prepared:
    """Open what a request needs, and check it. Raises StorageError."""
    from functa.tasks.inference.sample import SampleJob
    from functa.tasks.trained import describe_denoiser

    location = open_location(root)
    checkpoint = stage_output(location, "train_diffusion").uri
    functaset = Functaset.open(stage_output(location, "encode"))
    meta = describe_denoiser(checkpoint)
    check_same_functaset(functaset, meta, root, "diffusion model")
    process, names = _process(location, meta, request, root), _class_names(location, meta)
    label = class_number(request.label, names, root)
    job = SampleJob(
        denoiser=checkpoint, process=process, seed=request.seed, start=0,
        labels=_labels(label, request.count, meta["classes"]), count=request.count, batch=SAMPLE_BATCH, device=device,
        output="",
    )  # fmt: skip
    return Prepared(job, decoder(functaset, request.resolution, device), "" if label is None else names[label])


def _process(location: Location, meta: Mapping[str, Any], request: SampleRequest, root: str) -> DiffusionConfig:
    """Return the trained process with the request's sampling settings, else those of the root's config."""
    trained, conditional = DiffusionConfig.model_validate(meta["process"]), meta["classes"] is not None
    for name in ("guidance", "label"):
        if not conditional and getattr(request, name) is not None:
            raise StorageError(f"{root}: its diffusion model is unconditional, so it takes no {name}")
    if request.sampler is not None and request.sampler not in SAMPLERS[trained.kind]:
        raise StorageError(
            f"sampler {request.sampler}: does not fit the model of {root}, whose process is {trained.kind}; choose "
            f"{' or '.join(SAMPLERS[trained.kind])}"
        )
    if trained.kind == "ddpm" and request.steps is not None and request.steps > trained.timesteps:
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


def _class_names(root: Location, meta: Mapping[str, Any]) -> list[str]:
    """Return the names of a conditional model's classes, by number; older ones are known to the root's classifier."""
    if meta["classes"] is None:
        return []
    names: list[str] = meta.get("class_names") or []
    if not names:
        with suppress(StorageError):  # without a classifier its classes have numbers
            names = (read_description(stage_output(root, "train_classifier")) or {}).get("class_names") or []
    return names or [str(number) for number in range(meta["classes"])]


def class_number(label: int | str | None, names: list[str], root: str) -> int | None:
    """Return the number of a class given by name or number. A name comes first: a class may be called 10."""
    if label is None or not names:
        return None
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        if not re.fullmatch("[0-9]{1,9}", label):
            near = get_close_matches(label, names, 3) or names[:10]
            raise StorageError(f"label {label}: {root} has no class of that name; did you mean {' or '.join(near)}?")
        label = int(label)
    if label >= len(names):
        raise StorageError(f"label {label}: the model has classes 0 to {len(names) - 1}")
    return label


def _labels(label: int | None, count: int, classes: int | None) -> tuple[int, ...] | None:
    if classes is None:
        return None
    return tuple(i % classes if label is None else label for i in range(count))
