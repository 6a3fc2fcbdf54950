"""What the command prints: summary, status, tables."""

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flows.config import STAGES
from flows.ledger import Ledger
from storage.errors import DamagedObject, MissingObject, StorageError, TransientError
from storage.locations import Location, open_location
from storage.stages import StageRecord, ended_unsaid, output_location, output_stands, read_record
from tasks.progress import time_left

if TYPE_CHECKING:
    from storage.collection import Collected

HEADLINE = (
    ("PSNR, test", "psnr_test", "{:.2f} dB"),
    ("  patch PCA, same numbers per patch", "psnr_pca_patch", "{:.2f} dB"),
    ("  whole-image PCA, same numbers", "psnr_pca_image", "{:.2f} dB"),
    ("Top-1, test", "top1_test", "{:.1%}"),
    ("Bits per latent number", "bits_per_dim", "{:.2f}"),
    ("Encoded images/s", "encode_images_per_s", "{:.0f}"),
)


def quiet_tracebacks() -> None:
    """Prefect prints a failed run's traceback at every level; a person is given one line, unless --debug asks.

    The run's page in the UI keeps them.
    """
    import prefect.main  # noqa: F401  sets up Prefect's logging

    if os.environ.get("FUNCTA_DEBUG"):
        return
    loggers = [logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "prefect.task_runs")]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if handler.formatter is not None and "Console" in type(handler).__name__:
            handler.formatter.format = _without_traceback(handler.formatter.format)  # type: ignore[method-assign]


def _without_traceback(render: Callable[[logging.LogRecord], str]) -> Callable[[logging.LogRecord], str]:
    """Of a copy: the handler that sends records to the server has left the traceback's text in the record."""

    def told(record: logging.LogRecord) -> str:
        bare = copy.copy(record)
        bare.exc_info = bare.exc_text = None
        return render(bare)

    return told


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


def read_status(root: str) -> dict[str, Any]:
    """{stages{name: state}, shards{done, left, bad}, images_per_s, damage[], errors{}}, of records and receipts alone.

    `errors` is what ended a stage's last try, by stage; one that stood before that still stands.
    A state is one of a record, or "not started", "missing" (its output is gone) or "damaged" (a line of `damage` says
    what). Who was killed cannot say so: of a process of this machine that is gone the state is "interrupted".
    """
    location = open_location(root)
    damage: list[str] = []
    records = {stage: _readable(location, stage, damage) for stage in STAGES}
    if not any(records.values()) and not damage:
        raise StorageError(f"{root}: no run has been started there; `functa run PRESET --root {root}` starts one")
    states = {}
    planned = _planned(records)
    for stage, record in records.items():
        if record is None and stage not in planned:
            continue  # the run's config has no such stage: nothing is missing
        garbled = any(f"/stages/{stage}.json" in line for line in damage)
        states[stage] = "damaged" if garbled else "not started" if record is None else _state(record, location, damage)
    shards: dict[str, Any] = {"done": 0, "left": 0, "bad": 0}
    errors = {stage: record.error for stage, record in records.items() if record is not None and record.error}
    told: dict[str, Any] = {"stages": states, "shards": shards, "images_per_s": None, "damage": damage}
    told["errors"] = errors
    encoded = records["encode"]
    if encoded is not None and states["encode"] != "missing":
        from storage.progress import status

        counted = status(output_location(encoded, location), ended=encoded.state == "finished")
        shards |= {k: counted[k] for k in shards}
        if counted["seconds"]:
            told["images_per_s"] = round(counted["rows"] / counted["seconds"], 2)
        if counted["damage"]:
            states["encode"] = "damaged"
            damage += [line for line in counted["damage"] if line not in damage]
    return told


def _readable(location: Location, stage: str, damage: list[str]) -> StageRecord | None:
    try:
        return read_record(location, stage)
    except TransientError:
        raise
    except StorageError as error:
        damage.append(str(error))
        return None


def _state(record: StageRecord, location: Location, damage: list[str]) -> str:
    if record.state != "finished":
        return "interrupted" if ended_unsaid(record) else record.state
    try:
        return "finished" if output_stands(record, location) else "missing"
    except (DamagedObject, MissingObject) as error:
        damage.append(str(error))
        return "damaged"


def _planned(records: dict[str, StageRecord | None]) -> tuple[str, ...]:
    """The stages of the run that was begun last in the root."""
    begun = [record for record in records.values() if record is not None and record.stages]
    return max(begun, key=lambda record: record.started).stages if begun else STAGES


def print_class(row: dict[str, Any]) -> None:
    """One line for an image: its class, how sure, what else it may be."""
    console = Console()
    if "error" in row:
        told = f"cannot be read: {row['error']}"
    else:
        (first, sure), *others = row["top"]
        told = f"{first} {sure:.0%}" + (f" (or {', '.join(f'{name} {p:.0%}' for name, p in others)})" if others else "")
    console.print(f"{row['image']}: {told}", soft_wrap=True, highlight=False, markup=False)


def print_status(root: str, told: dict[str, Any]) -> None:
    """A table of stages, and a line of shards."""
    console = Console()
    table = Table("stage", "state", title=root, title_justify="left")
    for stage, state in told["stages"].items():
        table.add_row(stage, state)
    console.print(table)
    shards = told["shards"]
    speed = "" if told["images_per_s"] is None else f"; {told['images_per_s']:.0f} images/s while encoding"
    console.print(f"Shards: {shards['done']} done, {shards['left']} left; {shards['bad']} bad inputs{speed}")
    for stage, line in told["errors"].items():
        console.print(f"{stage}, last try: {line}", soft_wrap=True, highlight=False, markup=False)
    for line in told["damage"]:
        console.print(f"Damaged: {line}", soft_wrap=True, highlight=False, markup=False)


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


def image_progress(word: str) -> Callable[[int, int], None]:
    """Tells on standard error, at most every second, of images done, rate and time left: call(done, total)."""
    console = Console(stderr=True, highlight=False)
    begun = told = time.monotonic()
    already: int | None = None

    def tell(done: int, total: int) -> None:
        nonlocal begun, told, already
        now = time.monotonic()
        if already is None:  # whatever was loaded and compiled before is no part of the rate
            already, begun = done, now
        if now - told < 1 or done <= already:
            return
        told, rate = now, (done - already) / (now - begun)
        left = time_left(done, total, rate)
        console.print(f"{word}: {done} of {total} images, {rate:.3g} images/s, {left}", soft_wrap=True)

    return tell


def shard_progress(word: str) -> Callable[[int, int, int], None]:
    """Tells on standard error, at most every second, of shards done, MB/s and time left: call(done, total, bytes)."""
    console = Console(stderr=True, highlight=False)
    begun = told = time.monotonic()
    already: int | None = None

    def tell(done: int, total: int, written: int) -> None:
        nonlocal told, already
        already = done if already is None else already
        now = time.monotonic()
        if done == total or now - told < 1 or not written:
            return
        told = now
        left = (now - begun) / (done - already) * (total - done)
        rate = written / 1e6 / (now - begun)
        console.print(f"{word}: {done} of {total} shards, {rate:.0f} MB/s, about {left:.0f} s left", soft_wrap=True)

    return tell
