"""Tables and lines about one run or one functaset."""

import json
import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import Ledger
from functa.flows.server.console import text_console
from functa.storage.images.sources import known_shape
from functa.storage.runs.stage_records import read_record
from functa.tasks.evaluation.catalogue import SPACES

if TYPE_CHECKING:
    from functa.storage.upkeep.gc import Collected

ABSENT = "\u2013"

HEADLINE = (
    ("PSNR, test", "psnr_test", "{:.2f} dB"),
    ("  patch PCA, same numbers per patch", "psnr_pca_patch", "{:.2f} dB"),
    ("  whole-image PCA, same numbers", "psnr_pca_image", "{:.2f} dB"),
    ("Top-1, test", "top1_test", "{:.1%}"),
    ("Bits per latent number", "bits_per_dim", "{:.2f}"),
    ("Encoded images/s", "encode_images_per_s", "{:.0f}"),
)


def foldable(*names: str, title: str) -> Table:
    """Return a table whose headings are folded, never cut: long names may differ at their ends alone."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def print_summary(ledger: Ledger, word: str) -> None:
    """Print a run's main figures and the location of its report."""
    console = text_console()
    record = read_record(ledger.location, "evaluate")
    metrics = {} if record is None else record.figures
    table = Table(title=f"{ledger.config.name}: {word}", show_header=False, title_justify="left")
    table.add_row("Latent of an image", _compression(ledger.config))
    for name, key, form in HEADLINE:
        if key in metrics:
            table.add_row(name, form.format(metrics[key]))
    for space, value in metrics.get("fd", {}).items():
        names = {"floor": "fd_reconstruction", "test images": "fd_test", "ceiling": "fd_noise"}
        bounds = {name: metrics.get(key, {}).get(space) for name, key in names.items()}
        beside = ", ".join(f"{name} {bound:.3g}" for name, bound in bounds.items() if bound is not None)
        table.add_row(f"Frechet distance, {SPACES.get(space, space)}", f"{value:.3g} ({beside})")
    if "seconds_by_stage" in metrics:
        table.add_row("Time", ", ".join(f"{k} {v:.0f} s" for k, v in metrics["seconds_by_stage"].items()))
    console.print(table)
    if (psnr := metrics.get("psnr_test")) is not None and psnr < metrics.get("psnr_pca_patch", psnr):
        console.print("PSNR is below patch PCA with as many numbers: train longer (meta_train.steps).", soft_wrap=True)
    root = ledger.location.uri
    console.print(f"Report:  {root}/report.html", soft_wrap=True)
    console.print(f"Metrics: {root}/metrics.json", soft_wrap=True)


def _compression(config: PipelineConfig) -> str:
    """Return how many numbers a latent has, and how many values its image, as far as the config gives its size."""
    shape = "x".join(map(str, config.field.latent_shape))
    resolution, channels, _ = known_shape(config.images)
    if resolution is None or channels is None:
        return f"{config.field.numbers:,} numbers ({shape})"
    return f"{config.field.numbers:,} numbers ({shape}) in place of {resolution**2 * channels:,} values"


def print_class(row: dict[str, Any]) -> None:
    """Print one line for an image: its class, the probability, and other classes that it may have."""
    if "error" in row:
        found = f"cannot be read: {row['error']}"
    else:
        (first, sure), *others = row["top"]
        also = ", ".join(f"{name} {probability:.0%}" for name, probability in others)
        found = f"{first} {sure:.0%}" + (f" (or {also})" if also else "")
    text_console().print(f"{row['image']}: {found}", soft_wrap=True)


def print_collected(done: "Collected") -> None:
    """Print what gc removed or would remove, and which objects it does not know."""
    would = "" if done.deleted else "would be "
    console = text_console(soft_wrap=True)
    for fragment in done.rewritten:
        console.print(f"fragment {fragment}: {would}rewritten without retired rows")
    for fragment in done.fragments:
        console.print(f"fragment {fragment}: {would}collected")
    if done.versions:
        console.print(f"versions {', '.join(map(str, done.versions))}: {would}expired")
    for key in done.unknown:
        console.print(f"{key}: unknown, left alone")
    for key in done.young:
        console.print(f"{key}: in no version, but recent, so a writer may be at work; run gc again later")
    ask = "" if done.deleted or not done.removed else "; --delete does it"
    console.print(f"{len(done.removed)} objects, {done.bytes / 1e6:.1f} MB {would}collected{ask}")


def print_functaset(uri: str, info: dict[str, Any], measured: float | None = None) -> None:
    """Print a functaset's info as a table; `measured` is the test PSNR that was measured of what it holds."""
    table = Table(title=uri, show_header=False, title_justify="left")
    for name, value in _functaset_rows(info, measured):
        table.add_row(name, value)
    text_console().print(table)


def _functaset_rows(info: dict[str, Any], measured: float | None) -> list[tuple[str, str]]:
    rows = ", ".join(f"{count:,} {split}" for split, count in info["rows_by_split"].items())
    asked = info["bits"] if isinstance(info["bits"], list) else [info["bits"]]
    found = [
        ("Version", f"{info['version']}, of {info['fragments']} fragment{'s'[: info['fragments'] != 1]}"),
        ("Rows", f"{rows}; {info['bad']} bad, {info['retired']} retired"),
        ("Latent", f"{'x'.join(map(str, info['shape']))}, {math.prod(info['shape']):,} numbers"),
        ("Bits per number", f"{' and '.join(map(str, asked))} asked for, {info['bits_per_dim']:.3f} measured"),
    ]
    for number, each in enumerate(info["ranges"]):
        found.append(("Range of the bins" if number == 0 else "", each["policy"]))
        tried = each["candidates"].items()
        found += [
            (f"  PSNR with {name}", f"{figures['psnr']:.2f} dB, {figures['clip_fraction']:.3%} clipped")
            for name, figures in tried
        ]
    if info["ranges"]:
        worst = f"; {info['clip_fraction_worst']:.4%} in the worst fragment" if info["fragments"] > 1 else ""
        found.append(("Clipped numbers", f"{info['clip_fraction']:.4%}{worst}"))
    found += [("PSNR before quantisation" if info["ranges"] else "PSNR", _psnr(info["psnr"]))]
    if info["clip_fraction"]:
        copied = "requantised_from" in info["fingerprint"]
        found.append(("  of clipped images", "before it too: measured in the source" if copied else "after it"))
    found += [(f"  {split}", _psnr(found)) for split, found in info["psnr"]["by_split"].items()]
    if info["ranges"]:
        after = "not measured; a run's report has PSNR by bits" if measured is None else f"{measured:.2f} dB, test"
        found.append(("PSNR after quantisation", after))
    latents = "codes" if info["ranges"] else "latents"
    found += [("Bytes", f"{info['bytes']:,}"), (f"  {latents}", f"{info['z_bytes']:,}")]
    found += [
        ("  labels, ids, field, records", f"{info['bytes'] - info['z_bytes']:,}"),
        ("Field", info["field"]),
        ("Content", info["content"]),
    ]
    found += [("Fingerprint", info["fingerprint_digest"])]
    return found + [(f"  {key}", json.dumps(value)) for key, value in info["fingerprint"].items()]


def _psnr(found: dict[str, Any]) -> str:
    if "mean" not in found:
        return "no good rows"
    quantiles = ", ".join(f"{float(q):.0%} {value:.1f}" for q, value in found["quantiles"].items())
    return f"{found['mean']:.2f} dB ({quantiles})"
