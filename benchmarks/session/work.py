"""Train and measure one piece, with the tasks of the pipeline and without Prefect."""

import hashlib
import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.session.kept import Kept, forget_optimizer
from benchmarks.session.pieces import Piece, config_of
from functa.flows.config.schema import PipelineConfig
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import pooled_psnr, psnr_of_errors
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import newest_step
from functa.tasks.encoding.encode import encode_group, encode_images
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, plan
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Samples
from functa.tasks.evaluation.generation.distances import measure
from functa.tasks.evaluation.generation.feature_inputs import write_inputs
from functa.tasks.evaluation.generation.features import FeatureJob, set_sizes, write_features
from functa.tasks.inference.decode import decoder
from functa.tasks.inference.png import contact_sheet, tile
from functa.tasks.inference.sample import SampleJob, read_samples, write_slice
from functa.tasks.inputs.pictures import Pictures
from functa.tasks.trained import load_field
from functa.tasks.training import classifier, diffusion, meta_train, pixel_classifier
from functa.tasks.training_jobs import (
    ClassifierJob,
    DiffusionJob,
    LatentJob,
    MetaTrainJob,
    PixelClassifierJob,
    TrainingJob,
)

Run = Callable[[Any, Callable[[dict[str, Any]], None]], dict[str, Any]]

TRIAL = {"cuda": 100, "cpu": 6}  # steps
SHOW_SECONDS = {"cuda": 15.0, "cpu": 0.0}  # between lines of a training
LEAST = 10  # steps of a training, however slow
MEASURED = 2048  # images at a time
FEATURES = 5000  # images of a slice
SHOWN = 64  # samples of the sheet


@dataclass(frozen=True)
class Session:
    """The folders, images and device that all pieces of a call share."""

    kept: Kept
    work: Path  # of this campaign on this machine
    images: Path  # of train.npz and test.npz
    counts: dict[str, int]  # images of each split
    device: str  # cuda or cpu
    save: Callable[[], None]  # called about every second of a training

    def root(self, piece: Piece) -> Path:
        """Return the folder of a row, laid out as a run's root."""
        return self.work / piece.row


def run(piece: Piece, session: Session) -> dict[str, Any]:
    """Do what is left of a piece; return its figures."""
    config = config_of(piece, str(session.images))
    figures: dict[str, Any] = {"field": field, "classifier": classify, "diffusion": generate}[piece.kind](
        piece, config, session
    )
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


def field(piece: Piece, config: PipelineConfig, session: Session) -> dict[str, Any]:
    """Train a field; measure the PSNR of all test images from float32 latents."""
    folder = session.root(piece) / "checkpoints" / "field"
    job = MetaTrainJob(
        seed=config.seed, device=session.device, output=str(folder), digest="", images=config.images,
        field=config.field, inner=config.inner, meta_train=config.meta_train,
    )  # fmt: skip
    figures = trained(piece, job, meta_train.run, session)
    drawn = config.meta_train.patches_per_image or config.field.positions
    figures["seen"] *= drawn / config.field.positions  # in whole images
    forget_optimizer(folder)
    network, inner, metadata = load_field(str(folder))
    side = metadata["resolution"]
    test = Pictures(open_images(config.images), "test", config.images)
    loop = InnerLoop(network.to(session.device), inner, (side, side))
    pixels = test.read(np.arange(len(test)))[0]
    _, errors = encode_images(loop, pixels, min(MEASURED, len(test)))
    return figures | {
        "latent": list(network.config.latent_shape), "psnr": psnr_of_errors(errors).mean().item(),
        "psnr_pooled": pooled_psnr(errors), "test_images": len(test),
    }  # fmt: skip


def classify(piece: Piece, config: PipelineConfig, session: Session) -> dict[str, Any]:
    """Encode all images with their augmentations, train a classifier on the latents, measure its test accuracy."""
    assert config.classifier is not None
    classes, output = open_images(config.images).classes, session.root(piece) / "checkpoints" / "classifier"
    job = ClassifierJob(
        seed=config.seed, device=session.device, output=str(output), digest="", classes=len(classes),
        class_names=tuple(classes), functaset=encoded(piece, config, session), classifier=config.classifier,
    )  # fmt: skip
    figures = trained(piece, job, classifier.run, session)
    return figures | {"augmentations": config.encode.augmentation.count, "test_images": session.counts["test"]}


def generate(piece: Piece, config: PipelineConfig, session: Session) -> dict[str, Any]:
    """Train a diffusion model on the latents, draw samples, measure how far they are from the training images."""
    assert config.diffusion is not None
    root, classes = session.root(piece), open_images(config.images).classes
    output, functaset = root / "checkpoints" / "diffusion", encoded(piece, config, session)
    job = DiffusionJob(
        seed=config.seed, device=session.device, output=str(output), digest="", classes=len(classes),
        functaset=functaset, diffusion=config.diffusion,
    )  # fmt: skip
    figures = trained(piece, job, diffusion.run, session)
    return figures | distances(config, root, functaset, str(figures["weights_digest"]), session)


def trained(piece: Piece, job: TrainingJob, run: Run, session: Session) -> dict[str, Any]:
    """Train to the piece's steps, which a trial of the same job decides once; return figures, steps and images seen."""
    known = session.kept.of(piece.name)
    if "steps" not in known:
        rate = trial(job, run, session)
        known["steps"] = min(piece.most, max(LEAST, int(60 * piece.minutes * rate)))
        session.save()
    job = shortened(job, known["steps"])
    digest = _digest(job)
    if known.get("digest") != digest:
        known |= {"digest": digest, "images": []}
    if session.counts["train"] not in known["images"]:
        known["images"].append(session.counts["train"])

    shown = -math.inf

    def emit(row: dict[str, Any]) -> None:
        nonlocal shown
        if "step" in row:
            known["progress"] = row["step"] / row["steps"]
        if "note" in row or time.monotonic() - shown >= SHOW_SECONDS[session.device]:
            shown = time.monotonic()
            keys = ("note", "step", "steps", "loss", "psnr_train", "images_per_s")
            print({key: row[key] for key in keys if key in row}, flush=True)
        session.save()

    begun = newest_step(open_location(job.output))
    print(f"{piece.name}: step {begun} of {known['steps']}", flush=True)
    figures = run(job.model_copy(update={"digest": digest}), emit)
    steps, batch = known["steps"], job.training.batch
    return figures | {"steps": steps, "batch": batch, "seen": steps * batch, "train_images": known["images"]}


def trial(job: TrainingJob, run: Run, session: Session) -> float:
    """Return the steps a second of a short run of the same job, without its start."""
    steps, rates = TRIAL[session.device], list[float]()

    def emit(row: dict[str, Any]) -> None:
        rates.extend(row[key] / job.training.batch for key in ("images_per_s",) if key in row)

    with tempfile.TemporaryDirectory(dir=session.work) as folder:
        short = shortened(job, steps).training.model_copy(update={"log_every": steps // 2})
        run(job.model_copy(update={"output": folder, "digest": "trial", job.kind: short}), emit)
    return rates[-1]


def shortened(job: TrainingJob, steps: int) -> Any:
    """Return the job with so many steps, a warm-up of at most a tenth of them, and ten evaluations at most."""
    section = job.training
    changed: dict[str, Any] = {"steps": steps, "warmup": min(section.warmup, steps // 10)}
    if hasattr(section, "evaluate_every"):
        changed["evaluate_every"] = -(-steps // 10)
    return job.model_copy(update={job.kind: section.model_copy(update=changed)})


def _digest(job: TrainingJob) -> str:
    """Return a digest of what decides the weights. When images are added, only trainings on images continue."""
    settings = job.model_dump_json(exclude={"output", "device", "digest", "functaset", "images"})
    latents = Path(job.functaset).name if isinstance(job, LatentJob) else ""
    return hashlib.sha256((settings + latents).encode()).hexdigest()[:16]


def encoded(piece: Piece, config: PipelineConfig, session: Session) -> str:
    """Encode all images with the row's field, eagerly: reading them takes longer. Return the functaset's path."""
    root = session.root(piece)
    digest = str(session.kept.finished()[str(piece.needs)]["weights_digest"])
    name = f"functaset-{digest}-{session.counts['train']}-{config.encode.augmentation.count}.zarr"
    job = EncodeJob(
        images=config.images, encode=config.encode, field=str(root / "checkpoints" / "field"), field_digest=digest,
        functaset=str(root / name), device=session.device, compile="off",
    )  # fmt: skip
    if latest(open_location(job.functaset)) is None:
        planned, begun = plan(job), time.monotonic()
        images = sum(group.images for group in planned.groups)
        for group in planned.groups:
            encode_group(job, group, images)
        finalise(job, planned)
        print(f"{piece.name}: {images} rows encoded in {time.monotonic() - begun:.0f} s", flush=True)
    return job.functaset


def distances(config: PipelineConfig, root: Path, functaset: str, digest: str, session: Session) -> dict[str, Any]:
    """Draw samples; measure them, reconstructions and noise latents in the features of a pixel classifier."""
    assert config.diffusion is not None
    images, settings = open_images(config.images), config.evaluation
    pixels = PixelClassifierJob(
        seed=settings.pixel_classifier.seed, device=session.device, images=config.images, digest="",
        output=str(root / "checkpoints" / "pixel_classifier"), pixel_classifier=settings.pixel_classifier,
    )  # fmt: skip
    pixels = pixels.model_copy(update={"digest": _digest(pixels)})
    accuracy = pixel_classifier.run(pixels, lambda row: None)["top1_pixels"]
    output = str(root / f"measured-{digest}")
    count = min(settings.samples, len(images.split("train")))
    begun = time.monotonic()
    slices = [
        write_slice(SampleJob(
            denoiser=str(root / "checkpoints" / "diffusion"), process=config.diffusion.process, seed=config.seed,
            start=start, labels=None, count=min(settings.slice, count - start), batch=settings.batch,
            device=session.device, output=f"{output}/samples",
        ))
        for start in range(0, count, settings.slice)
    ]  # fmt: skip
    seconds = time.monotonic() - begun
    job = EvaluationJob(
        seed=config.seed, images=config.images, quantization=config.encode.quantization, evaluation=settings,
        calibration_images=config.encode.calibration_images, functaset=functaset,
        field=str(root / "checkpoints" / "field"), diffusion=str(root / "checkpoints" / "diffusion"),
        pixel_classifier=pixels.output, spaces=("classifier",), output=output, device=session.device,
    )  # fmt: skip
    sets = {kind: (rows, -(-rows // FEATURES)) for kind, rows in set_sizes(images, count).items()}
    write_inputs(output, images, functaset, sets)
    features = [
        write_features(FeatureJob(
            evaluation=job, kind=kind, part=part, parts=parts, count=count, images=rows, slices=tuple(slices),
        ))
        for kind, (rows, parts) in sets.items() for part in range(parts)
    ]  # fmt: skip
    samples = Samples(slices=tuple(slices), features=tuple(features))
    figures = measure(job.model_copy(update={"samples": samples}))
    show(functaset, slices, session)
    names = ("fd", "fd_reconstruction", "fd_noise", "kd", "precision", "recall")
    return {name: figures[name].get("classifier") for name in names} | {
        "samples": count, "duplicates": figures["duplicates"], "sampling_seconds": seconds, "top1_pixels": accuracy,
    }  # fmt: skip


def show(functaset: str, slices: list[str], session: Session) -> None:
    """Write a sheet of the first samples into the carried folder."""
    z = torch.from_numpy(read_samples(slices, 0, SHOWN))
    images = decoder(Functaset.open(functaset), None, session.device)(z)
    buffer = io.BytesIO()
    contact_sheet([tile(image) for part in images for image in part]).save(buffer, "PNG")
    session.kept.write("samples.png", buffer.getvalue())
