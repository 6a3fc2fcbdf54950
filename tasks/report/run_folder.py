"""The run's folder: config.yaml, metrics.jsonl, metrics.json, images/, report.html, and the copies at the root."""

import hashlib
import json
import math
import shlex
from typing import Any

import numpy as np
import yaml

from functa.models.config import Config
from functa.storage.places.address import open_location
from functa.storage.runs.curve import read_curve
from functa.tasks.evaluation.evaluator_input import all_arrays, read_arrays
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.files import page_files
from functa.tasks.report.overview.summary import title
from functa.tasks.report.page import write_report
from functa.tasks.report.sections import report_sections
from functa.tasks.stage_table import STAGES


class RunFolder(Config):
    """Everything that a report is written from; small and JSON."""

    root: str
    run: str  # URI of runs/<id>
    config: dict[str, Any]
    records: dict[str, dict[str, Any]]  # the finished stages' records
    outputs: dict[str, str]  # stage -> URI of its output, pixel_classifier included
    metrics: dict[str, Any]
    classes: list[str]
    bad_inputs: list[dict[str, str]]
    images_digest: str
    created: str
    command: str = ""  # that repeats the run; of older runs it was not kept

    @property
    def report_uri(self) -> str:
        """Return the URI of this run's report."""
        return f"{self.run}/report.html"


def write_run(folder: RunFolder) -> ReportData:
    """Write everything; the root's copies last, so that a root's report never shows half a run."""
    data = report_data(folder)
    run, root = open_location(folder.run), open_location(folder.root)
    sections = report_sections(data)
    run.write("run.json", folder.model_dump_json(indent=1).encode())
    run.write("config.yaml", yaml.safe_dump(folder.config, sort_keys=False).encode())
    rows = [row for curve in data.curves.values() for row in curve]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for name, content in page_files(sections).items():
        run.write(f"images/{name}", content)
    metrics = _metrics_json(folder)
    report = write_report(data, sections).encode()
    for location in (run, root):
        location.write("metrics.json", metrics)
        location.write("report.html", report)
    return data


def _metrics_json(folder: RunFolder) -> bytes:
    return json.dumps(_numbers(folder.metrics), indent=1, allow_nan=False).encode()


def _numbers(value: Any) -> Any:
    """Replace figures that are not finite by null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _numbers(below) for key, below in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_folder(run: str) -> RunFolder:
    """Read what the report of runs/<id> was written from."""
    return RunFolder.model_validate_json(open_location(run).read("run.json"))


def report_data(folder: RunFolder) -> ReportData:
    """Read everything that the report shows from where the stages wrote it."""
    shown = read_arrays(folder.run, "reconstruction")
    sampled = read_arrays(folder.run, "samples")
    labels = sampled.get("labels")
    return ReportData(
        title=f"Spatial functa: {title(folder.config)}",
        images_by_split=_images_by_split(folder),
        config=folder.config,
        metrics=folder.metrics,
        curves=_curves(folder),
        originals=shown.get("originals"),
        reconstructions=shown.get("reconstructions"),
        samples=sampled.get("samples"),
        sample_labels=None if labels is None else _names(labels, folder.classes),
        psnr_per_image=shown.get("psnr"),
        classes=folder.classes,
        arrays=all_arrays(folder.run),
        lineage=lineage(folder),
        bad_inputs=folder.bad_inputs,
        stages=[
            {"stage": name, "state": record["state"], "seconds": record["seconds"]}
            for name, record in folder.records.items()
        ],
        created=folder.created,
        versions=folder.metrics.get("versions", {}),
        command=folder.command or f"functa run {shlex.quote(folder.run)}/config.yaml --root {shlex.quote(folder.root)}",
    )


def _images_by_split(folder: RunFolder) -> dict[str, int]:
    """Return how many images each split has: training images are stored with so many augmentations each."""
    rows = folder.records.get("encode", {}).get("figures", {}).get("info", {}).get("rows_by_split", {})
    versions = 1 + folder.config["encode"]["augmentation"]["count"]
    return {split: count // versions if split == "train" else count for split, count in rows.items()}


def _names(labels: np.ndarray, classes: list[str]) -> list[str] | None:
    if (labels < 0).any():
        return None
    return [classes[i] for i in labels]


def _curves(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    curves = {}
    for stage in [*(stage.name for stage in STAGES.values() if stage.trains), "pixel_classifier"]:
        if stage not in folder.outputs:
            continue
        location = open_location(folder.outputs[stage])
        if rows := read_curve(location):
            curves[stage] = rows
    return curves


def lineage(folder: RunFolder) -> list[dict[str, Any]]:
    """Return images, field, functaset, models and metrics, each with its digest and what it was made from."""
    images = folder.config["images"]
    rows = [{"what": "images", "name": images["source"], "digest": folder.images_digest, "made_from": "", "when": "",
             "where": images["location"] or "scikit-learn"}]  # fmt: skip
    for stage in STAGES.values():
        record = folder.records.get(stage.name)
        if record is None:
            continue
        sources = ", ".join(f"{name.replace('_', '-')} {digest}" for name, digest in record["inputs"].items())
        if "commit" in record["figures"]:
            sources += f", commit {record['figures']['commit']}"
        rows.append(
            {
                "what": stage.product,
                "name": stage.command,
                "digest": record["output_digest"],
                "made_from": sources or "images",
                "when": record["finished"],
                "where": folder.outputs.get(stage.name, record["output"]),
            }
        )
    metrics = hashlib.sha256(_metrics_json(folder)).hexdigest()[:16]
    rows.append(
        {
            "what": "metrics",
            "name": "evaluate",
            "digest": metrics,
            "made_from": "all of the above",
            "when": folder.created,
            "where": f"{folder.run}/metrics.json",
        }
    )
    return rows
