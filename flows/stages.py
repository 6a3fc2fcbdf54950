"""One flow per stage. Each reads its inputs from the root, writes its output there, and does nothing if it stands."""

from typing import Any
from uuid import uuid4

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from functa.flows.config.consistency import latent_surplus
from functa.flows.config.digests import digest, require_stage
from functa.flows.config.preflight import preflight
from functa.flows.config.schema import PipelineConfig
from functa.flows.jobs import (
    classes,
    classifier_job,
    diffusion_job,
    draw_jobs,
    encode_job,
    evaluation_job,
    feature_jobs,
    meta_train_job,
    pixel_classifier_job,
    run_folder,
    sample_jobs,
    stale_models,
)
from functa.flows.ledger import Ledger, images_digest
from functa.flows.server.worker import on_gpu
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.images.sources import known_shape
from functa.tasks import units
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.fan_out import fan_out
from functa.tasks.dispatch.progress import as_far_as_heard
from functa.tasks.encoding.keyed_images import forget_images
from functa.tasks.encoding.plan import Planned
from functa.tasks.encoding.progress import Following, encoding_speed
from functa.tasks.evaluation.evaluator import Evaluator
from functa.tasks.evaluation.evaluators import chosen
from functa.tasks.evaluation.generation.distances import delete_features


@flow(name="meta-train", flow_run_name="meta-train {config.name}", persist_result=False)
@on_gpu
def meta_train(root: str, *, from_root: str | None = None, config: PipelineConfig) -> None:
    """Meta-trains the field on the training images.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
    """
    ledger = Ledger(config, root, from_root)
    if _stands(ledger, "meta_train"):
        return
    warn_of_surplus(config)
    training = config.meta_train
    with ledger.working("meta_train") as record:
        job = meta_train_job(ledger, record)
        figures = units.retried(units.train, config.dispatch)(job, "the field", training.batch, None)
        speed = training.steps * training.batch / max(figures["seconds"], 1e-9)
        figures["meta_images_per_s"] = round(speed, 2)
        ledger.finish(record, figures.pop("weights_digest"), figures)


@flow(name="encode", flow_run_name="encode {config.name}", persist_result=False)
@on_gpu
def encode(
    root: str,
    *,
    from_root: str | None = None,
    retry_bad: bool = False,
    repair: bool = False,
    retire_lost: bool = False,
    config: PipelineConfig,
) -> None:
    """Encodes every image into the functaset: plan, map over shard groups, finalise.

    Run again, it encodes images that are new or changed, and no longer shows those that are gone.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
        retry_bad: Images that could not be encoded are tried again.
        repair: Every object of the functaset is read, and the images of damaged shards are encoded again.
        retire_lost: Rows of images that are gone are retired however many they are, and in a repair those of changed
            ones too; else they end it.
    """
    ledger = Ledger(config, root, from_root)
    if repair or retry_bad:
        ledger.require_begun("encode")
    elif _stands(ledger, "encode"):
        return
    ledger.require("meta_train")
    with ledger.working("encode") as record:
        job = encode_job(ledger, record) | {"retry_bad": retry_bad, "repair": repair, "retire_lost": retire_lost}
        # Before anything is planned: what comes after that is for the next time. A repair looks for nothing new.
        images = open_images(config.images)
        seen, classes = "" if repair else images_digest(images), images.classes
        planned = units.retried(units.plan_encoding, config.dispatch)(job)
        stats = encode_groups(job, planned, config.dispatch)
        done = units.retried(units.finalise_encoding, config.dispatch)(job, planned)
        # What a model that learns from it must have in common with it. A repair keeps the labels that there were.
        choices = digest({"fingerprint": done["info"]["fingerprint_digest"], "classes": classes})
        choices = record.figures.get("choices", choices) if repair else choices
        speed = encoding_speed(stats, record.figures)
        figures = done | speed | {"images_digest": seen, "choices": choices}
        ledger.finish(record, done["info"]["content"], figures)
    with as_far_as_heard("the functaset's figures"):
        create_table_artifact(
            [{"figure": key, "value": value} for key, value in _flat(done["info"] | speed).items()],
            key="functaset",
            description=f"What {ledger.output(record)} holds",
        )


def encode_groups(job: dict[str, Any], planned: dict[str, Any], dispatch: DispatchConfig) -> list[dict[str, Any]]:
    """Maps over the planned groups of shards, wherever the config says; the stats of each."""
    groups, run = planned["groups"], uuid4().hex
    images = sum(group["images"] for group in groups)
    each = [{"job": job, "group": group, "images": images, "run": run} for group in groups]
    following = Following(job["functaset"], Planned.model_validate(planned))
    return fan_out(units.retried(units.encode_shards, dispatch), each, dispatch, following, forget_images)


@flow(name="train-classifier", flow_run_name="train-classifier {config.name}", persist_result=False)
@on_gpu
def train_classifier(
    root: str, *, from_root: str | None = None, threads: int | None = None, config: PipelineConfig
) -> None:
    """Trains the classifier on latents.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
        threads: Of the training process; empty: all cores.
    """
    ledger = Ledger(config, root, from_root)
    if _stands(ledger, "train_classifier"):
        return
    functaset = ledger.require("encode")
    with ledger.working("train_classifier") as record:
        job = classifier_job(ledger, record, functaset)
        batch = job["classifier"]["batch"]
        figures = units.retried(units.train, config.dispatch)(job, "the classifier", batch, threads)
        ledger.finish(record, figures.pop("weights_digest"), figures)


@flow(name="train-diffusion", flow_run_name="train-diffusion {config.name}", persist_result=False)
@on_gpu
def train_diffusion(
    root: str, *, from_root: str | None = None, threads: int | None = None, config: PipelineConfig
) -> None:
    """Trains the diffusion model on latents.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
        threads: Of the training process; empty: all cores.
    """
    ledger = Ledger(config, root, from_root)
    if _stands(ledger, "train_diffusion"):
        return
    functaset = ledger.require("encode")
    with ledger.working("train_diffusion") as record:
        job = diffusion_job(ledger, record, functaset)
        batch = job["diffusion"]["batch"]
        figures = units.retried(units.train, config.dispatch)(job, "the diffusion model", batch, threads)
        ledger.finish(record, figures.pop("weights_digest"), figures)


@flow(name="evaluate", flow_run_name="evaluate {config.name}", persist_result=False)
@on_gpu
def evaluate(root: str, *, from_root: str | None = None, config: PipelineConfig) -> None:
    """Measures what the finished stages made, and writes the report.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
    """
    ledger = Ledger(config, root, from_root)
    if _stands(ledger, "evaluate"):
        return
    ledger.require_inputs("evaluate")
    for name in stale_models(ledger):
        get_run_logger().warning(
            f"{name.replace('_', '-')}: what stands is of other inputs, so it is not measured; run it again"
        )
    with ledger.working("evaluate") as record:
        run = ledger.output(record)
        metrics = _measure(ledger, evaluation_job(ledger, run))
        described = run_folder(ledger, record, run, metrics)
        units.retried(units.write_report, config.dispatch)(described)
        ledger.finish(record, digest(described["metrics"]), described["metrics"])
    _delete_features(run)


def warn_of_surplus(config: PipelineConfig) -> None:
    """A line in the run's log where the latent is larger than the image: allowed, but seldom meant."""
    resolution, channels, _ = known_shape(config.images)
    if resolution is None or channels is None:
        images = open_images(config.images)
        resolution, channels = images.resolution, images.channels
    warning = latent_surplus(config.field, resolution, channels)
    if warning is not None:
        get_run_logger().warning(warning)


def _measure(ledger: Ledger, job: dict[str, Any]) -> dict[str, Any]:
    """Run the evaluators that the config asks for, of the models that have been trained."""
    models = {model for model in ("classifier", "diffusion") if job[model]}
    evaluators = chosen(ledger.config.evaluation, models)
    metrics = _run_evaluators(ledger, job, [each for each in evaluators if "diffusion" not in each.needs])
    return metrics | _measure_samples(ledger, job, [each for each in evaluators if "diffusion" in each.needs])


def _run_evaluators(ledger: Ledger, job: dict[str, Any], evaluators: list[Evaluator]) -> dict[str, Any]:
    measure, metrics = units.retried(units.measure, ledger.config.dispatch), dict[str, Any]()
    for evaluator in evaluators:
        metrics |= measure(evaluator.name, job)
    return metrics


def _measure_samples(ledger: Ledger, job: dict[str, Any], evaluators: list[Evaluator]) -> dict[str, Any]:
    """Make what these evaluators need (samples, their features, the draws of each class), then run them."""
    if not evaluators:
        return {}
    needs, metrics = {name for evaluator in evaluators for name in evaluator.needs}, dict[str, Any]()
    pictures_only = not needs & {"features", "draws"}
    if "features" in needs:
        job, metrics = _train_pixel_classifier(ledger, job)
    slices, labels = sample_jobs(ledger, job, pictures_only)
    if not pictures_only:
        _warn_of_fewer_samples(ledger, slices)
    files, features = _draw(ledger, slices), list[str]()
    if "features" in needs:
        each = [{"job": job} for job in feature_jobs(ledger, job, files, labels)]
        features = fan_out(units.retried(units.compute_features, ledger.config.dispatch), each, ledger.config.dispatch)
    samples = {"slices": files, "labels": labels, "features": features}
    plain = [evaluator for evaluator in evaluators if "draws" not in evaluator.needs]
    metrics |= _run_evaluators(ledger, job | {"samples": samples}, plain)
    counted = [evaluator for evaluator in evaluators if "draws" in evaluator.needs]
    if counted:
        slices, drawn = draw_jobs(ledger, job)
        draws = {"slices": _draw(ledger, slices), "labels": drawn} if slices else samples
        metrics |= _run_evaluators(ledger, job | {"samples": draws}, counted)
    return metrics


def _draw(ledger: Ledger, slices: list[dict[str, Any]]) -> list[str]:
    """Draw slices of samples, wherever the config says; return the URIs of their files."""
    dispatch = ledger.config.dispatch
    return fan_out(units.retried(units.sample_slice, dispatch), [{"job": job} for job in slices], dispatch)


def _train_pixel_classifier(ledger: Ledger, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the pixel classifier; return the job and its figures. Of a single class there is nothing to learn."""
    evaluation = ledger.config.evaluation
    if len(classes(ledger)) < 2:
        get_run_logger().warning(
            "the images are of one class, which no pixel classifier can learn features from: distances are of latents "
            "(and of Inception's features, where evaluation.fid.weights is given)"
        )
        return job | {"pixel_classifier": ""}, {}
    pixels = pixel_classifier_job(ledger, job)
    train = units.retried(units.train, ledger.config.dispatch)
    trained = train(pixels, "the pixel classifier", evaluation.pixel_classifier.batch, None)
    return job, {"top1_pixels": trained["top1_pixels"]}


def _warn_of_fewer_samples(ledger: Ledger, slices: list[dict[str, Any]]) -> None:
    """Warn where fewer samples are drawn than asked for: at most as many as there are reconstructions."""
    wanted, count = ledger.config.evaluation.samples, sum(job["count"] for job in slices)
    if count < wanted:
        get_run_logger().warning(
            f"evaluation.samples={wanted}, but {count} are drawn: as many as there are training images"
        )


def _delete_features(run: str) -> None:
    """Delete the features of a finished run; a failed one keeps them, so that the next need not compute them again."""
    try:
        delete_features(run)
    except StorageError as error:
        get_run_logger().warning(f"{run}/features: its .npz files are no longer needed, delete them ({error})")


def _stands(ledger: Ledger, stage: str) -> bool:
    require_stage(ledger.config, stage)
    record = ledger.current(stage, must_ask=True)
    if record is None:
        preflight(ledger.config, ledger.root, stage)
    else:
        get_run_logger().info(
            f"{stage.replace('_', '-')} stands in {ledger.output(record)}: nothing to do{ledger.outrun(record)}"
        )
    return record is not None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values with dotted names, for a table."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
