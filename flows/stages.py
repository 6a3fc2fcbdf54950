"""One flow per stage of the table. Each reads its inputs from the root and writes its output there."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from functa.flows.config.consistency import latent_surplus
from functa.flows.config.digests import digest
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
    tracking_job,
)
from functa.flows.ledger import Ledger, images_digest
from functa.flows.server.pool.nodes import train_on_nodes
from functa.flows.stage_flow import stage_flow, taking_part
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.images.sources import known_shape
from functa.tasks import prefect_tasks
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.fan_out import call_once, fan_out
from functa.tasks.dispatch.progress import count, warn_if_unreachable
from functa.tasks.dispatch.tracking.following import tracked
from functa.tasks.encoding.keyed_images import forget_images
from functa.tasks.encoding.plan import EncodeJob, Planned
from functa.tasks.encoding.progress import Following, encoding_speed
from functa.tasks.evaluation.evaluator import Evaluator
from functa.tasks.evaluation.evaluator_input import EvaluationJob, Samples
from functa.tasks.evaluation.evaluators import chosen
from functa.tasks.evaluation.generation.distances import delete_features
from functa.tasks.evaluation.generation.spaces import chosen_spaces, obstacles
from functa.tasks.inference.ready.adopt import adopt
from functa.tasks.inference.sample import SampleJob
from functa.tasks.report.artifacts import cells, markdown
from functa.tasks.stage_table import STAGES
from functa.tasks.training_jobs import TrainingJob


@stage_flow
def meta_train(ledger: Ledger, threads: int | None) -> None:
    """Meta-train the field."""
    config = ledger.config
    _warn_of_large_latent(config)
    with taking_part(ledger, "meta_train") as record:
        job = meta_train_job(ledger, record)
        if config.field.pretrained is not None:
            if not job.node:
                ledger.finish(record, adopt(job), {})
            return
        figures = _train(ledger, job, threads)
        if not job.node:
            speed = config.meta_train.steps * config.meta_train.batch / max(figures["seconds"], 1e-9)
            figures["meta_images_per_s"] = round(speed, 2)
            ledger.finish(record, figures.pop("weights_digest"), figures)


@stage_flow
def encode(ledger: Ledger, retry_bad: bool, repair: bool, retire_lost: bool) -> None:
    """Plan, map over groups of shards, finalise."""
    dispatch = ledger.config.dispatch
    with ledger.working("encode") as record:
        job = encode_job(ledger, record, retry_bad=retry_bad, repair=repair, retire_lost=retire_lost)
        # Read before planning: what arrives later is for the next run. A repair does not look for new images.
        images = open_images(ledger.config.images)
        seen, classes = "" if repair else images_digest(images), images.classes
        for note in images.notes if flow_run.parent_flow_run_id is None else ():  # else its pipeline has shown them
            get_run_logger().warning(note)
        if job.latents:
            get_run_logger().info(f"the latents are taken from {job.latents}, where they have 32 bits")
        planning = prefect_tasks.retried(prefect_tasks.plan_encoding, dispatch)
        planned = Planned.model_validate(call_once(planning, dispatch, job=job))
        stats = encode_groups(job, planned, dispatch)
        _warn_of_clipped_images(stats)
        done = prefect_tasks.retried(prefect_tasks.finalise_encoding, dispatch)(job, planned)
        # What a model trained on it must have in common with it. A repair keeps the labels as they were.
        choices = digest({"fingerprint": done["info"]["fingerprint_digest"], "classes": classes})
        choices = record.figures.get("choices", choices) if repair else choices
        speed = encoding_speed(stats, record.figures)
        figures = done | speed | {"images_digest": seen, "choices": choices}
        ledger.finish(record, done["info"]["content"], figures)
    with warn_if_unreachable("the functaset's figures"):
        create_table_artifact(
            cells([{"figure": key, "value": value} for key, value in _flat(done["info"] | speed).items()]),
            key="functaset",
            description=f"Contents of {markdown(ledger.output(record))}",
        )


def _warn_of_clipped_images(stats: list[dict[str, Any]]) -> None:
    """Log a warning that names the image that lies farthest outside the quantiser's range, if any lies far outside."""
    outside = {key: share for each in stats for key, share in each["outside"].items()}
    if outside:
        worst = max(outside, key=lambda key: outside[key])
        get_run_logger().warning(
            f"{count(len(outside), 'image')} far outside the quantiser's range, such as {worst}: {outside[worst]:.0%} "
            f"of its latent numbers are clipped; the stored PSNR is that of the clipped latent"
        )


def encode_groups(job: EncodeJob, planned: Planned, dispatch: DispatchConfig) -> list[dict[str, Any]]:
    """Map over the planned groups of shards, with the runner of the config; return the stats of each."""
    images, run = sum(group.images for group in planned.groups), uuid4().hex
    each = [{"job": job, "group": group, "images": images, "run": run} for group in planned.groups]
    following = Following(job.functaset, planned)
    return fan_out(
        prefect_tasks.retried(prefect_tasks.encode_shards, dispatch), each, dispatch, following, forget_images
    )


@stage_flow
def train_classifier(ledger: Ledger, threads: int | None) -> None:
    """Train the classifier."""
    with taking_part(ledger, "train_classifier") as record:
        job = classifier_job(ledger, record)
        figures = _train(ledger, job, threads)
        if not job.node:
            ledger.finish(record, figures.pop("weights_digest"), figures)


@stage_flow
def train_diffusion(ledger: Ledger, threads: int | None) -> None:
    """Train the diffusion model."""
    with taking_part(ledger, "train_diffusion") as record:
        job = diffusion_job(ledger, record)
        figures = _train(ledger, job, threads)
        if not job.node:
            ledger.finish(record, figures.pop("weights_digest"), figures)


@stage_flow
def evaluate(ledger: Ledger) -> None:
    """Run the evaluators and write the report."""
    for name in stale_models(ledger):
        get_run_logger().warning(
            f"{STAGES[name].command}: its model was trained on other inputs and is not measured; run it again"
        )
    with ledger.working("evaluate") as record:
        run = ledger.output(record)
        metrics = _measure(ledger, evaluation_job(ledger, run))
        described = run_folder(ledger, record, run, metrics)
        prefect_tasks.retried(prefect_tasks.write_report, ledger.config.dispatch)(described)
        ledger.finish(record, digest(described.metrics), described.metrics)
    _delete_features(run)


def _train(ledger: Ledger, job: TrainingJob, threads: int | None = None) -> dict[str, Any]:
    """Train in a process of its own, or in one on each node of the pool; return figures, weights_digest among them."""
    with tracked(tracking_job(ledger, job), get_run_logger().warning):
        if ledger.config.dispatch.trains_on_pool:
            return train_on_nodes(job, ledger.config.dispatch)
        return prefect_tasks.retried(prefect_tasks.train, ledger.config.dispatch)(job, threads)


def _warn_of_large_latent(config: PipelineConfig) -> None:
    """Log a warning if the latent is larger than the image: allowed, but seldom meant."""
    resolution, channels, _ = known_shape(config.images)
    if resolution is None or channels is None:
        images = open_images(config.images)
        resolution, channels = images.resolution, images.channels
    warning = latent_surplus(config.field, resolution, channels)
    if warning is not None:
        get_run_logger().warning(warning)


def _measure(ledger: Ledger, job: EvaluationJob) -> dict[str, Any]:
    """Run the evaluators that the config asks for, of the models that have been trained."""
    models = {model for model in ("classifier", "diffusion") if getattr(job, model)}
    evaluators = chosen(ledger.config.evaluation, models)
    metrics = _run_evaluators(ledger, job, [each for each in evaluators if "diffusion" not in each.needs])
    return metrics | _measure_samples(ledger, job, [each for each in evaluators if "diffusion" in each.needs])


def _run_evaluators(ledger: Ledger, job: EvaluationJob, evaluators: list[Evaluator]) -> dict[str, Any]:
    """Run evaluators side by side, on the dispatch of the config; one that needs another's arrays after that."""
    dispatch = ledger.config.dispatch
    measure, metrics, left = prefect_tasks.retried(prefect_tasks.measure, dispatch), dict[str, Any](), evaluators
    while left:
        waiting = {evaluator.name for evaluator in left}
        ready = [evaluator for evaluator in left if not waiting & set(evaluator.needs)]
        for measured in fan_out(measure, [{"name": evaluator.name, "job": job} for evaluator in ready], dispatch):
            metrics |= measured
        left = [evaluator for evaluator in left if evaluator not in ready]
    return metrics


def _measure_samples(ledger: Ledger, job: EvaluationJob, evaluators: list[Evaluator]) -> dict[str, Any]:
    """Make what these evaluators need (samples, their features, the draws of each class), then run them."""
    if not evaluators:
        return {}
    needs, metrics = {name for evaluator in evaluators for name in evaluator.needs}, dict[str, Any]()
    counted_apart = bool(draw_jobs(ledger, job)[0])  # draws of their own: no other samples are needed to count them
    pictures_only = "features" not in needs and ("draws" not in needs or counted_apart)
    if "features" in needs:
        job = job.model_copy(update={"spaces": _spaces(ledger)})
        if "classifier" in job.spaces:
            metrics = _train_pixel_classifier(ledger, job)
    slices, labels = sample_jobs(ledger, job, pictures_only)
    if not pictures_only:
        _warn_of_fewer_samples(ledger, slices)
    files, features = _draw(ledger, slices), list[str]()
    if "features" in needs:
        each = [{"job": job} for job in feature_jobs(ledger, job, files, labels)]
        features = fan_out(
            prefect_tasks.retried(prefect_tasks.compute_features, ledger.config.dispatch), each, ledger.config.dispatch
        )
    samples = _samples(files, labels, features)
    plain = [evaluator for evaluator in evaluators if "draws" not in evaluator.needs]
    metrics |= _run_evaluators(ledger, job.model_copy(update={"samples": samples}), plain)
    counted = [evaluator for evaluator in evaluators if "draws" in evaluator.needs]
    if counted:
        slices, drawn = draw_jobs(ledger, job)
        draws = _samples(_draw(ledger, slices), drawn) if slices else samples
        metrics |= _run_evaluators(ledger, job.model_copy(update={"samples": draws}), counted)
    return metrics


def _samples(files: list[str], labels: list[int] | None, features: Sequence[str] = ()) -> Samples:
    return Samples(slices=tuple(files), labels=None if labels is None else tuple(labels), features=tuple(features))


def _draw(ledger: Ledger, slices: list[SampleJob]) -> list[str]:
    """Draw slices of samples on the dispatch of the config; return the URIs of their files."""
    dispatch = ledger.config.dispatch
    return fan_out(
        prefect_tasks.retried(prefect_tasks.sample_slice, dispatch), [{"job": job} for job in slices], dispatch
    )


def _spaces(ledger: Ledger) -> tuple[str, ...]:
    """Return the feature spaces to compare samples in; log which ones the images or this machine do not allow."""
    generation, side = ledger.config.evaluation.generation, open_images(ledger.config.images).resolution
    assert generation is not None  # otherwise nothing needs features
    left_out = obstacles(side, len(classes(ledger)))
    if generation.spaces is None and left_out:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        get_run_logger().info(f"feature spaces in which samples are not compared: {reasons}")
    return chosen_spaces(generation.spaces, side, len(classes(ledger)))


def _train_pixel_classifier(ledger: Ledger, job: EvaluationJob) -> dict[str, Any]:
    """Train the pixel classifier; return its figures."""
    dispatch, training = ledger.config.dispatch, pixel_classifier_job(ledger, job.pixel_classifier)
    with tracked(tracking_job(ledger, training), get_run_logger().warning):
        trained = call_once(prefect_tasks.retried(prefect_tasks.train, dispatch), dispatch, job=training, threads=None)
    return {"top1_pixels": trained["top1_pixels"]}


def _warn_of_fewer_samples(ledger: Ledger, slices: list[SampleJob]) -> None:
    """Warn where fewer samples are drawn than asked for: at most as many as there are reconstructions."""
    wanted, count = ledger.config.evaluation.samples, sum(job.count for job in slices)
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values with dotted names, for a table."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
