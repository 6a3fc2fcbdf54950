"""What the command prints: summary, status, tables."""

import json
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from functa.flows.ledger import Ledger
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import read_record

if TYPE_CHECKING:
    from functa.storage.upkeep.gc import Collected
from pathlib import Path

if TYPE_CHECKING:
    from functa.tasks.report.compare.runs import Comparison


HEADLINE = (
    ("PSNR, test", "psnr_test", "{:.2f} dB"),
    ("  patch PCA, same numbers per patch", "psnr_pca_patch", "{:.2f} dB"),
    ("  whole-image PCA, same numbers", "psnr_pca_image", "{:.2f} dB"),
    ("Top-1, test", "top1_test", "{:.1%}"),
    ("Bits per latent number", "bits_per_dim", "{:.2f}"),
    ("Encoded images/s", "encode_images_per_s", "{:.0f}"),
)


def print_summary(ledger: Ledger, word: str) -> None:
    """The run's figures and where its report is."""
    console = Console()
    record = read_record(ledger.location, "evaluate")
    metrics = {} if record is None else record.figures
    table = Table(title=f"{ledger.config.name}: {word}", show_header=False, title_justify="left")
    for name, key, form in HEADLINE:
        if key in metrics:
            table.add_row(name, form.format(metrics[key]))
    for space, value in metrics.get("fd", {}).items():
        floor, ceiling = (metrics[f"fd_{name}"][space] for name in ("reconstruction", "noise"))
        table.add_row(
            f"Frechet distance, {space}", f"{value:.3g} (reconstructions {floor:.3g}, noise latents {ceiling:.3g})"
        )
    if "seconds_by_stage" in metrics:
        table.add_row("Time", ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds_by_stage"].items()))
    console.print(table)
    root = ledger.location.uri
    console.print(f"Report:  {root}/report.html\nMetrics: {root}/metrics.json", soft_wrap=True, highlight=False)


def print_class(row: dict[str, Any]) -> None:
    """One line for an image: its class, how sure, what else it may be."""
    console = Console()
    if "error" in row:
        told = f"cannot be read: {row['error']}"
    else:
        (first, sure), *others = row["top"]
        told = f"{first} {sure:.0%}" + (f" (or {', '.join(f'{name} {p:.0%}' for name, p in others)})" if others else "")
    console.print(f"{row['image']}: {told}", soft_wrap=True, highlight=False, markup=False)


def print_collected(done: "Collected") -> None:
    """What gc removed, or would remove, and what lies there that is not ours."""
    would = "" if done.deleted else "would be "
    console = Console(soft_wrap=True, highlight=False)
    for fragment in done.rewritten:
        console.print(f"fragment {fragment}: {would}written anew without retired rows")
    for fragment in done.fragments:
        console.print(f"fragment {fragment}: {would}removed")
    if done.versions:
        console.print(f"versions {', '.join(map(str, done.versions))}: {would}given up")
    for key in done.unknown:
        console.print(f"{key}: not ours, left alone")
    for key in done.young:
        console.print(f"{key}: in no version, but young: somebody may be at work; run gc again later")
    ask = "" if done.deleted or not done.removed else "; --delete does it"
    console.print(f"{len(done.removed)} objects, {done.bytes / 1e6:.1f} MB {would}removed{ask}")


def print_functaset(uri: str, info: dict[str, Any]) -> None:
    """A functaset's info as a table that a person can read."""
    table = Table(title=uri, show_header=False, title_justify="left")
    for name, told in _functaset_rows(info):
        table.add_row(name, told)
    Console().print(table)


def _functaset_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = ", ".join(f"{count:,} {split}" for split, count in info["rows_by_split"].items())
    asked = info["bits"] if isinstance(info["bits"], list) else [info["bits"]]
    told = [
        ("Version", f"{info['version']}, of {info['fragments']} fragment{'s'[: info['fragments'] != 1]}"),
        ("Rows", f"{rows}; {info['bad']} bad, {info['retired']} retired"),
        ("Latent", f"{'x'.join(map(str, info['shape']))}, {math.prod(info['shape']):,} numbers"),
        ("Bits per number", f"{' and '.join(map(str, asked))} asked for, {info['bits_per_dim']:.3f} measured"),
    ]
    for number, each in enumerate(info["ranges"]):
        told.append(("Range of the bins" if number == 0 else "", each["policy"]))
        tried = each["candidates"].items()
        told += [
            (f"  PSNR with {name}", f"{figures['psnr']:.2f} dB, {figures['clip_fraction']:.3%} clipped")
            for name, figures in tried
        ]
    if info["ranges"]:
        told.append(("Clipped numbers", f"{info['clip_fraction']:.4%}"))
    told += [("PSNR before quantisation" if info["ranges"] else "PSNR", _psnr(info["psnr"]))]
    told += [(f"  {split}", _psnr(found)) for split, found in info["psnr"]["by_split"].items()]
    told += [("Bytes", f"{info['bytes']:,}"), ("Field", info["field"]), ("Content", info["content"])]
    told += [("Fingerprint", info["fingerprint_digest"])]
    return told + [(f"  {key}", json.dumps(value)) for key, value in info["fingerprint"].items()]


def _psnr(found: dict[str, Any]) -> str:
    if "mean" not in found:
        return "no good rows"
    quantiles = ", ".join(f"{float(q):.0%} {value:.1f}" for q, value in found["quantiles"].items())
    return f"{found['mean']:.2f} dB ({quantiles})"


DIFFERS, ABSENT = "\u2260", "\u2013"


def print_sweep(root: str) -> None:
    """Mean and sd of every setting, what a choice would be made on, and where the report is."""
    place = open_location(root)
    told = json.loads(place.read("sweep.json"))
    console = Console()
    table = _with_columns(*told["over"], *told["metrics"], title=f"{told['preset']}: sweep")
    for setting in told["settings"]:
        seeds = sum(member["values"] == setting["values"] for member in told["members"])
        figures = [_summary(setting["metrics"].get(metric), seeds) for metric in told["metrics"]]
        table.add_row(*setting["values"].values(), *figures)
    console.print(table)
    for line in told["splits"].values():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Report:  {place.uri}/report.html\nTable:   {place.uri}/sweep.csv", soft_wrap=True, highlight=False)


def _with_columns(*names: str, title: str) -> Table:
    """Headings are folded, never cut: long names may differ at their ends alone."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _summary(found: dict[str, Any] | None, seeds: int) -> str:
    """Mean and sd, and of how many seeds where some have no figure."""
    if found is None:
        return ABSENT
    count = len(found["values"])
    spread = "" if found["sd"] is None else f" \u00b1 {found['sd']:.2g}"
    return f"{found['mean']:.4g}{spread}" + (f" ({count} of {seeds})" if count < seeds else "")


def print_comparison(comparison: "Comparison", out: Path | None) -> None:
    """Every figure of every run, differences marked, and the config keys that differ."""
    console = Console()
    names = [run.name for run in comparison.runs]
    table = _with_columns("", "figure", *names, title="Figures")
    for line in comparison.lines:
        shown = [ABSENT if value is None else value for value in line.shown]
        table.add_row(DIFFERS if line.differs else "", line.name, *shown, style="bold" if line.differs else None)
    console.print(table)
    if comparison.settings:
        keys = _with_columns("key", *names, title="Config keys that differ")
        for key, values in comparison.settings.items():
            keys.add_row(key, *("not set" if value is None else json.dumps(value) for value in values))
        console.print(keys)
    else:
        console.print("No config key differs.")
    if out is not None:
        console.print(f"Report:  {out.absolute()}", soft_wrap=True, highlight=False)
