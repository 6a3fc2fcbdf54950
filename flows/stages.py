"""One flow per stage. Each reads its inputs from the root, writes its output there, and does nothing if it stands."""

from datetime import UTC, datetime
from typing import Any

from prefect import flow, get_run_logger, unmapped
from prefect.artifacts import create_table_artifact

from flows.config import PipelineConfig
from flows.jobs import (
    classifier_job,
    diffusion_job,
    encode_job,
    evaluation_job,
    meta_train_job,
    pixel_classifier_job,
    run_folder,
    sample_jobs,
)
from flows.ledger import Ledger
from tasks import units
from tasks.dispatch import task_runner


@flow(name="meta-train", flow_run_name="meta-train {config.name}", persist_result=False)
def meta_train(root: str, config: PipelineConfig, from_root: str | None = None) -> None:
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
    record = ledger.begin("meta_train")
    training = config.meta_train
    figures = units.retried(units.train, config.dispatch)(
        meta_train_job(ledger, record), "the field", training.batch, None
    )
    speed = training.steps * training.batch / max(figures["seconds"], 1e-9)
    ledger.finish(record, figures["weights_digest"], {"meta_images_per_s": round(speed, 2)})


@flow(name="encode", flow_run_name="encode {config.name}", persist_result=False)
def encode(root: str, config: PipelineConfig, from_root: str | None = None) -> None:
    """Encodes every image into the functaset: plan, map over shard groups, finalise.

    Args:
        root: Where everything goes: a folder or s3://bucket/prefix. A config other than the one that stands there needs
            another root.
        config: Everything that the run is made of.
        from_root: Finished stages are taken over from this root where their digests agree.
    """
    ledger = Ledger(config, root, from_root)
    if _stands(ledger, "encode"):
        return
    ledger.require("meta_train")
    record = ledger.begin("encode")
    job = encode_job(ledger, record)
    groups = units.retried(units.plan_encoding, config.dispatch)(job)
    images = sum(group["images"] for group in groups)
    with task_runner(config.dispatch) as runner:
        shards = units.retried(units.encode_shards, config.dispatch)
        parameters = {"job": unmapped(job), "group": groups, "images": unmapped(images)}
        stats = [future.result() for future in runner.map(shards, parameters)]
    done = units.retried(units.finalise_encoding, config.dispatch)(job, groups)
    speed = _encoding_speed(stats)
    ledger.finish(record, done["info"]["fingerprint_digest"], done | speed)
    create_table_artifact(
        [{"figure": key, "value": value} for key, value in _flat(done["info"] | speed).items()],
        key="functaset",
        description=f"What {ledger.output(record)} holds",
    )


@flow(name="train-classifier", flow_run_name="train-classifier {config.name}", persist_result=False)
def train_classifier(
    root: str, config: PipelineConfig, from_root: str | None = None, threads: int | None = None
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
    record = ledger.begin("train_classifier")
    job = classifier_job(ledger, record, functaset)
    figures = units.retried(units.train, config.dispatch)(job, "the classifier", config.classifier.batch, threads)
    ledger.finish(record, figures.pop("weights_digest"), figures)


@flow(name="train-diffusion", flow_run_name="train-diffusion {config.name}", persist_result=False)
def train_diffusion(
    root: str, config: PipelineConfig, from_root: str | None = None, threads: int | None = None
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
    record = ledger.begin("train_diffusion")
    job = diffusion_job(ledger, record, functaset)
    figures = units.retried(units.train, config.dispatch)(job, "the diffusion model", config.diffusion.batch, threads)
    ledger.finish(record, figures.pop("weights_digest"), figures)


@flow(name="evaluate", flow_run_name="evaluate {config.name}", persist_result=False)
def evaluate(root: str, config: PipelineConfig, from_root: str | None = None) -> None:
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
    ledger.require("encode")
    folder = f"runs/{run_id()}"
    record = ledger.begin("evaluate", output=folder)
    run = ledger.location.child(*folder.split("/")).uri
    job = evaluation_job(ledger, run)
    metrics = _measure(ledger, job)
    described = run_folder(ledger, record, run, metrics)
    units.retried(units.write_report, config.dispatch)(described)
    ledger.finish(record, "", described["metrics"])


def _measure(ledger: Ledger, job: dict[str, Any]) -> dict[str, Any]:
    """What can be measured of the stages that have run."""
    dispatch = ledger.config.dispatch
    metrics: dict[str, Any] = units.retried(units.measure_reconstruction, dispatch)(job)
    if job["classifier"]:
        metrics |= units.retried(units.measure_classification, dispatch)(job)
    if job["diffusion"]:
        pixels = pixel_classifier_job(ledger, job)
        batch = ledger.config.evaluation.pixel_classifier.batch
        trained = units.retried(units.train, dispatch)(pixels, "the pixel classifier", batch, None)
        metrics["top1_pixels"] = trained["top1_pixels"]
        slices, labels = sample_jobs(ledger, job)
        with task_runner(dispatch) as runner:
            futures = runner.map(units.retried(units.sample_slice, dispatch), {"job": slices})
            files = [future.result() for future in futures]
        metrics |= units.retried(units.measure_generation, dispatch)(job, files, labels)
    return metrics


def _stands(ledger: Ledger, stage: str) -> bool:
    record = ledger.standing(stage)
    if record is not None:
        get_run_logger().info(f"{stage.replace('_', '-')} stands in {ledger.output(record)}: nothing to do")
    return record is not None


def _encoding_speed(stats: list[dict[str, Any]]) -> dict[str, float]:
    images = sum(s["images"] for s in stats)
    seconds = sum(s["read"] + s["encode"] + s["write"] for s in stats)
    return {"encode_images_per_s": round(images / seconds, 2)} if images else {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values with dotted names, for a table."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def run_id() -> str:
    """UTC time, so that runs sort; two in one second get the same folder only if they share a root and a second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
