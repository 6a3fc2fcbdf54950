"""Make the jobs that tasks receive from config and ledger: URIs, sections of the config, digests."""

from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from functa.flows.config.command import command_line
from functa.flows.config.digests import digest, seed_of, settings, stages_of
from functa.flows.config.estimate import parameters
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger, images_digest, now
from functa.storage.errors import MissingObject
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.places.local import LocalLocation
from functa.storage.runs.checkpoints import load_checkpoint, newest_metadata
from functa.storage.runs.stage_records import StageRecord, read_record
from functa.tasks.config import SAMPLING_KEYS
from functa.tasks.dispatch.tracking.job import TrackingJob
from functa.tasks.encoding.plan import EncodeJob
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.evaluation.generation.distances import reference_labels
from functa.tasks.evaluation.generation.feature_inputs import write_inputs
from functa.tasks.evaluation.generation.features import FeatureJob, part_of, set_sizes
from functa.tasks.inference.sample import SampleJob
from functa.tasks.report.run_folder import RunFolder
from functa.tasks.stage_table import STAGES
from functa.tasks.training_jobs import (
    ClassifierJob,
    DiffusionJob,
    MetaTrainJob,
    PixelClassifierJob,
    TrainingJob,
    this_node,
)

KEPT_ASIDE = (
    "info",
    "bad_inputs",
    "seconds",
    "images_digest",
    "choices",
    "commit",
)  # of a record's figures, not figures of the run


def meta_train_job(ledger: Ledger, record: StageRecord) -> MetaTrainJob:
    """Return the job of the field's training."""
    config = ledger.config
    return MetaTrainJob(
        seed=config.seed, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        output=ledger.output(record), digest=ledger.digest("meta_train"), **_places(config),
    )  # fmt: skip


def _places(config: PipelineConfig) -> dict[str, Any]:
    """Return where the processes of a training run: devices and machines."""
    dispatch = config.dispatch
    nodes = {"nodes": dispatch.nodes, "node": this_node(dispatch), "rendezvous": dispatch.rendezvous}
    return {"device": dispatch.device, "devices": dispatch.devices} | (nodes if dispatch.nodes > 1 else {})


def encode_job(ledger: Ledger, record: StageRecord, **options: bool) -> EncodeJob:
    """Return the job of encoding all images."""
    field = ledger.require("meta_train")
    return EncodeJob(
        images=ledger.config.images, encode=ledger.config.encode, field=ledger.output(field),
        field_digest=field.output_digest, functaset=ledger.output(record), device=ledger.config.dispatch.device,
        compile=ledger.config.inner.compile, latents="" if options.get("repair") else ledger.float_latents(), **options,
    )  # fmt: skip


def classifier_job(ledger: Ledger, record: StageRecord) -> ClassifierJob:
    """Return the job of the classifier's training."""
    config, functaset = ledger.config, ledger.require("encode")
    assert config.classifier is not None  # otherwise the config does not have the stage
    version, name = _commit_to_train_on(ledger, record, functaset)
    return ClassifierJob(
        seed=seed_of(config, record.stage), classifier=config.classifier, functaset=ledger.output(functaset),
        classes=len(classes(ledger)), class_names=tuple(classes(ledger)), output=ledger.output(record),
        version=version, digest=name, hydrate=config.dispatch.hydrate, **_places(config),
    )  # fmt: skip


def diffusion_job(ledger: Ledger, record: StageRecord) -> DiffusionJob:
    """Return the job of the diffusion model's training."""
    config, functaset = ledger.config, ledger.require("encode")
    assert config.diffusion is not None  # otherwise the config does not have the stage
    version, name = _commit_to_train_on(ledger, record, functaset)
    return DiffusionJob(
        seed=seed_of(config, record.stage), diffusion=config.diffusion, functaset=ledger.output(functaset),
        classes=len(classes(ledger)), class_names=tuple(classes(ledger)), output=ledger.output(record),
        version=version, digest=name, hydrate=config.dispatch.hydrate, **_places(config),
    )  # fmt: skip


def tracking_job(ledger: Ledger, job: TrainingJob) -> TrackingJob | None:
    """Return the job of the tracker that shows a training's curve; None where the config has none.

    Its files lie in the root, of a root in a bucket in ./functa-tracking. The first machine alone has a curve.
    """
    if ledger.config.tracking is None or job.node:
        return None
    root, sections = ledger.location, {name: getattr(job, name) for name in type(job).model_fields}
    name = root.uri.rstrip("/").rpartition("/")[2]
    flat = {key: value for prefix, section in sections.items() if isinstance(section, BaseModel)
            for key, value in settings(section, prefix).items()}  # fmt: skip
    return TrackingJob(
        kind=ledger.config.tracking,
        folder=f"{root.uri}/tracking" if isinstance(root, LocalLocation) else f"functa-tracking/{name}",
        project=ledger.config.name, run=name, stage=job.kind, output=job.output, digest=job.digest,
        settings={key: str(value) for key, value in flat.items() if key not in ("images.location", "images.labels")},
    )  # fmt: skip


def _commit_to_train_on(ledger: Ledger, record: StageRecord, functaset: StageRecord) -> tuple[int, str]:
    """Return (commit, digest of the training): the commit of the checkpoint to resume from, else the newest."""
    location = open_location(ledger.output(functaset))

    def name(version: int) -> str:
        return digest({"training": ledger.digest(record.stage), "commit": version})

    before = newest_metadata(open_location(ledger.output(record))) or {}
    version = before.get("functaset", {}).get("version")
    if version is not None and before.get("digest") == name(version):
        with suppress(MissingObject):  # the commit has expired: train on the newest
            return Functaset.open(location, version).version, name(version)
    newest = Functaset.open(location).version
    return newest, name(newest)


def stale_models(ledger: Ledger) -> list[str]:
    """Return the stages whose model was trained, but is no longer up to date."""
    trained = [stage for stage in stages_of(ledger.config) if STAGES[stage].trains]
    return [stage for stage in trained if read_record(ledger.location, stage) and ledger.up_to_date(stage) is None]


def evaluation_job(ledger: Ledger, run: str) -> EvaluationJob:
    """Return the job of a run's evaluators, with the outputs of the finished stages."""
    config, finished = ledger.config, _finished(ledger)
    outputs = {stage: ledger.output(record) for stage, record in finished.items()}
    return EvaluationJob(
        seed=seed_of(config, "evaluate"), images=config.images, quantization=config.encode.quantization,
        evaluation=config.evaluation, calibration_images=config.encode.calibration_images,
        functaset=outputs["encode"], field=outputs["meta_train"], classifier=outputs.get("train_classifier", ""),
        diffusion=outputs.get("train_diffusion", ""), output=run, device=config.dispatch.device,
        pixel_classifier=pixel_classifier_location(ledger), sampling=_sampling(config),
    )  # fmt: skip


def _sampling(config: PipelineConfig) -> dict[str, Any]:
    """Return how samples are drawn: distances of one sampler are not another's."""
    if config.diffusion is None:
        return {}
    process = config.diffusion.process
    unused = set() if process.sampler == "ddpm" else {"variance"}
    return process.model_dump(mode="json", include=set(SAMPLING_KEYS) - unused)


def pixel_classifier_location(ledger: Ledger) -> str:
    """Return the location of the pixel classifier: in the root reused from, if that has trained the same one."""
    own = ledger.location.child("checkpoints", "pixel_classifier")
    if ledger.from_root is None:
        return own.uri
    other = open_location(ledger.from_root).child("checkpoints", "pixel_classifier")
    found = load_checkpoint(other)  # whole, or it would be trained again, and another root is only read
    if found is None or not found.metadata.get("finished"):
        return own.uri
    return other.uri if found.metadata.get("digest") == _pixel_classifier_digest(ledger.config) else own.uri


def _pixel_classifier_digest(config: PipelineConfig) -> str:
    """Return a digest of its config and the current images: a new class changes the shape of the model."""
    images = open_images(config.images)
    chosen = settings(config.images, "images") | settings(config.evaluation.pixel_classifier, "pixel_classifier")
    return digest({"config": chosen, "images": images_digest(images), "classes": images.classes})


def pixel_classifier_job(ledger: Ledger, output: str) -> PixelClassifierJob:
    """Return the job of the classifier whose features Frechet distances use: its config and the images decide it.

    Its seed is its own: runs of several seeds are measured in one space.
    """
    config = ledger.config
    return PixelClassifierJob(
        seed=config.evaluation.pixel_classifier.seed, images=config.images,
        pixel_classifier=config.evaluation.pixel_classifier,
        device=config.dispatch.device, devices=config.dispatch.devices, output=output,
        digest=_pixel_classifier_digest(config),
    )  # fmt: skip


def sample_jobs(ledger: Ledger, job: EvaluationJob, pictures_only: bool) -> tuple[list[SampleJob], list[int] | None]:
    """Return slices of the samples that are compared, or of a few to look at; and all labels (None: unconditional)."""
    config = ledger.config
    diffusion = config.diffusion
    assert diffusion is not None  # no job.diffusion without one
    labels = None
    training = open_images(config.images).split("train").labels
    wanted = config.evaluation.shown if pictures_only else config.evaluation.samples
    count = min(wanted, len(training))  # as many as there are reconstructions to compare with
    if diffusion.process.labelled:
        labels = [int(label) for label in reference_labels(training, count)]
    return _slices(ledger, job, labels, count, "samples"), labels


def draw_jobs(ledger: Ledger, job: EvaluationJob) -> tuple[list[SampleJob], list[int]]:
    """Return the slices of each class's samples for Table 7, and all labels; empty if those for distances serve."""
    diffusion, memorization = ledger.config.diffusion, ledger.config.evaluation.memorization
    each = None if memorization is None else memorization.draws_per_class
    if each is None or diffusion is None or not diffusion.process.labelled:
        return [], []
    there = sorted(set(open_images(ledger.config.images).split("train").labels.tolist()))
    labels = [int(label) for label in there for _ in range(each)]
    return _slices(ledger, job, labels, len(labels), "draws"), labels


def _slices(ledger: Ledger, job: EvaluationJob, labels: list[int] | None, count: int, folder: str) -> list[SampleJob]:
    """Return the jobs that draw `count` samples, a slice per dispatched task, into this folder of the run."""
    config = ledger.config
    assert config.diffusion is not None
    size = config.evaluation.slice
    return [
        SampleJob(
            denoiser=job.diffusion, process=config.diffusion.process, seed=seed_of(config, "evaluate"), start=start,
            labels=None if labels is None else tuple(labels[start : start + size]),
            count=min(size, count - start), batch=config.evaluation.batch, device=config.dispatch.device,
            compile=config.diffusion.compile,
            output=f"{job.output}/{folder}",
        )
        for start in range(0, count, size)
    ]  # fmt: skip


def feature_jobs(ledger: Ledger, job: EvaluationJob, slices: list[str], labels: list[int] | None) -> list[FeatureJob]:
    """Return the feature slices of every set that is compared: samples, images to set beside them, reference."""
    images, size = open_images(ledger.config.images), ledger.config.evaluation.features_slice
    count = min(ledger.config.evaluation.samples, len(images.split("train")))
    sets = {kind: (rows, -(-rows // size)) for kind, rows in set_sizes(images, count).items()}
    write_inputs(job.output, images, job.functaset, sets)
    jobs = []
    for kind, (rows, parts) in sets.items():
        for part in range(parts):
            samples = kind == "samples"
            own = [labels[row] for row in part_of(count, part, parts)] if samples and labels is not None else None
            jobs.append(FeatureJob(
                evaluation=job, kind=kind, part=part, parts=parts, count=count, images=rows,
                slices=tuple(slices) if samples else (), labels=None if own is None else tuple(own),
            ))  # fmt: skip
    return jobs


def run_folder(ledger: Ledger, record: StageRecord, run: str, measured: dict[str, Any]) -> RunFolder:
    """Return everything that the report is written from. A skipped stage's figures come from its record."""
    finished = _finished(ledger)
    outputs = {stage: ledger.output(r) for stage, r in finished.items()}
    outputs["pixel_classifier"] = pixel_classifier_location(ledger)
    encoded = finished["encode"].figures
    return RunFolder(
        root=ledger.root, run=run, config=ledger.config.model_dump(mode="json"),
        records={stage: r.model_dump(mode="json") for stage, r in finished.items()},
        outputs=outputs, metrics=_metrics(ledger, finished, measured, record), classes=classes(ledger),
        bad_inputs=encoded["bad_inputs"], created=now(), images_digest=encoded["images_digest"],
        command=command_line(ledger.config, ledger.root, ledger.from_root),
    )  # fmt: skip


def _metrics(
    ledger: Ledger, finished: dict[str, StageRecord], measured: dict[str, Any], record: StageRecord
) -> dict[str, Any]:
    """Return what metrics.json holds: what was measured, and nothing else."""
    figures = dict(measured)
    for stage in finished.values():
        figures |= {k: v for k, v in stage.figures.items() if k not in KEPT_ASIDE}
    encoded = finished["encode"].figures
    info = encoded["info"]
    figures |= {k: info[k] for k in ("bits_per_dim", "rows", "clip_fraction")}
    figures |= {"bad_inputs": len(encoded["bad_inputs"]), "fingerprint": info["fingerprint_digest"]}
    figures["seconds_by_stage"] = {stage: r.seconds for stage, r in finished.items()}
    figures["seconds_by_stage"]["evaluate"] = ledger.seconds()
    images = open_images(ledger.config.images)
    counts = parameters(ledger.config, images.resolution, images.channels, len(images.classes))
    figures["parameters"] = {name: count for name, count in counts.items() if count is not None}
    figures["versions"] = record.versions
    return figures


def _finished(ledger: Ledger) -> dict[str, StageRecord]:
    """Return the records of the stages before evaluation that are up to date."""
    records = {stage: ledger.up_to_date(stage) for stage in STAGES if stage != "evaluate"}
    return {stage: record for stage, record in records.items() if record is not None}


def classes(ledger: Ledger) -> list[str]:
    """Return the names of the image source's classes."""
    return open_images(ledger.config.images).classes
