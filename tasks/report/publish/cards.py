"""Model card and data card of an export, from the report's figures and the provenance of what was made.

Both are Markdown with the hub's metadata in front, which other readers show as a table or skip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from functa.storage.errors import printable
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.location import Location
from functa.storage.publish.manifest import Kind
from functa.storage.runs.stage_records import StageRecord, output_location, read_record
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.overview.cards import Card, cards
from functa.tasks.report.overview.summary import summary, title, warnings
from functa.tasks.report.run_folder import RunFolder, report_data
from functa.tasks.report.words import number
from functa.tasks.stage_table import STAGES

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
         (10_000_000, "1M<n<10M"))  # fmt: skip

RESULTS = (  # key of metrics.json, inner key, the hub's task, its metric, name
    ("psnr_test", None, "image-to-image", "psnr", "Test PSNR in dB"),
    ("top1_test", None, "image-classification", "accuracy", "Test top-1 accuracy"),
    ("fid", None, "unconditional-image-generation", "fid", "FID"),
    ("fd", "classifier", "unconditional-image-generation", "frechet_distance",
     "Fr\u00e9chet distance on features of a pixel classifier"),
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """The facts of an export that are not in it."""

    name: str
    address: str
    licence: str
    kind: Kind
    pictures: Sequence[str] = ()


def measured(root: Location) -> ReportData | None:
    """Return what the report of a root's newest run shows, None where nothing was measured."""
    records = {name: record for name in STAGES if (record := read_record(root, name)) and record.output_digest}
    if "evaluate" not in records:
        return None
    outputs = {name: output_location(record, root).uri for name, record in records.items()}
    run = output_location(records["evaluate"], root)
    stored = RunFolder.model_validate_json(run.read("run.json"))
    return report_data(stored.model_copy(update={"root": root.uri, "run": run.uri, "outputs": outputs}))


def model_card(about: About, root: Location) -> bytes:
    """Return the card of a root's models."""
    from huggingface_hub import EvalResult, ModelCardData

    records = {name: record for name in STAGES if (record := read_record(root, name)) and record.output_digest}
    newest = max(records.values(), key=lambda record: record.started)
    data = measured(root) or ReportData(title="", config=newest.pipeline)
    data_name = _plain(title(newest.pipeline | {"name": ""}).removesuffix(" ()")) or about.name
    results = [
        EvalResult(task_type=task, dataset_type=data_name, dataset_name=data_name, dataset_split="test",
                   metric_type=metric, metric_value=round(value, 4), metric_name=name)
        for key, inner, task, metric, name in RESULTS
        if (value := number(data.metrics, key, inner)) is not None
    ]  # fmt: skip
    trained = [STAGES[name].product for name in records if STAGES[name].trains]
    metadata = ModelCardData(
        license=about.licence.lower(), library_name="functa", model_name=about.name, eval_results=results or None,
        tags=["neural-field", "functa", *(product.replace(" ", "-") for product in trained)],
    )  # fmt: skip
    text = _template("model_card.md.j2").render(
        about=about, summary=_plain(summary(data)), config=newest.pipeline, warnings=warnings(data),
        products=trained, records=records, headlines=[_row(card) for card in cards(data)],
        provenance=_provenance(records, data), versions=newest.versions, data_name=data_name,
        memorized=number(data.metrics, "memorized_share"), outdated=_outdated(records),
    )  # fmt: skip
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}".encode()


def data_card(about: About, places: dict[str, Location], classes: Sequence[str] = (), layout: str = "zarr") -> bytes:
    """Return the card of functasets, of their latents in another format where `layout` names one."""
    from huggingface_hub import DatasetCardData

    found = {name: Functaset.open(place).info() for name, place in places.items()}
    rows = sum(each["rows"] for each in found.values())
    size = next((name for most, name in SIZES if rows < most), "n>10M")
    more: dict[str, Any] = {}
    if layout == "parquet":
        splits = sorted({split for each in found.values() for split in each["rows_by_split"]}, reverse=True)
        files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
        more["configs"] = [{"config_name": "default", "data_files": files}]
    metadata = DatasetCardData(
        license=about.licence.lower(), pretty_name=about.name, size_categories=[size],
        tags=["neural-field", "functa", "latents", layout], **more,
    )  # fmt: skip
    text = _template("data_card.md.j2").render(
        about=about, found=found, rows=rows, classes=[_plain(name) for name in classes], layout=layout
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}".encode()


def _row(card: Card) -> tuple[str, str, str]:
    return _plain(card.name), _plain(f"{card.value} {card.unit}".strip()), _plain(", ".join(card.beside))


def _provenance(records: dict[str, StageRecord], data: ReportData) -> list[tuple[str, str, str, str]]:
    """Return (product, digest, made from, when) of each thing that was made."""
    images = [(row["what"], row["digest"], "", "") for row in data.lineage[:1]]
    made = [
        (STAGES[name].product, record.output_digest,
         ", ".join(f"{STAGES[source].product} {digest}" for source, digest in record.inputs.items()) or "images",
         record.finished)
        for name, record in records.items()
    ]  # fmt: skip
    return [*images, *made]


def _outdated(records: dict[str, StageRecord]) -> bool:
    """Return whether the figures are of other models or of another version of the functaset than the export's."""
    evaluated = records.get("evaluate")
    now = {name: record.output_digest for name, record in records.items()}
    return evaluated is not None and any(now.get(name) != digest for name, digest in evaluated.inputs.items())


def _plain(text: str) -> str:
    """Return a text that is no markup: names of classes and folders may be anybody's."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in printable(text))


@cache
def _template(name: str) -> Any:
    environment = Environment(  # noqa: S701  Markdown; what comes from others goes through _plain
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(name)
