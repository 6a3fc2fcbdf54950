"""`functa store ...`: looking into a functaset, checking, thinning and copying it."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter, validators
from pydantic import ValidationError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from functa.flows.cli.arguments import Functaset, Json, Split, functaset_of, whole
from functa.flows.config.schema import ConfigError
from functa.storage.config import QuantizationConfig
from functa.storage.functaset.functaset import Functaset as Store
from functa.storage.places.address import open_location
from functa.storage.upkeep.requantize import requantize

store = App(name="store", help="Look into a functaset, check it, thin it out, copy it.")

OLDER_THAN = "Hours since the last change of what was never committed; less than a run takes can cost its work."


@store.command
def info(uri: Functaset, *, as_json: Json = False) -> int:
    """Rows, versions, shapes, bits, PSNR, bytes, fingerprint."""
    from functa.storage.functaset.functaset import Functaset as Store

    told = Store.open(functaset_of(uri)).info()
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        from functa.flows.cli.tables import print_functaset

        print_functaset(uri, told)
    return 0


@store.command
def verify(
    uri: Functaset,
    *,
    deep: Annotated[bool, Parameter(help="Re-read every checksum.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Check the functaset against its receipts; status 1 names every bad object."""
    from functa.storage.places.address import open_location
    from functa.storage.upkeep.verify import verify as verify_store

    report = verify_store(open_location(functaset_of(uri)), deep=deep)
    if as_json:
        print(json.dumps({"checked": report.checked, "bad": report.bad}, indent=1))
    else:
        for bad in report.bad:
            print(f"{bad['path']}: {bad['fault']}")
        print(f"{report.checked} objects checked, {len(report.bad)} bad")
    return 1 if report.bad else 0


@store.command
def retire(uri: Functaset, *keys: Annotated[str, Parameter(help="The images' keys.")], split: Split = "train") -> int:
    """No longer show some images; their bytes stay until gc --erase-retired."""
    from functa.storage.functaset.commit import retire as retire_images
    from functa.storage.places.address import open_location

    if not keys:
        raise ConfigError("KEYS: name one image at least, by the key that `functa store retire` is to find")
    made = retire_images(open_location(functaset_of(uri)), split, keys)
    print(f"version {made.version} shows {sum(entry.rows for entry in made.fragments)} rows")
    return 0


@store.command
def gc(
    uri: Functaset,
    *,
    delete: Annotated[bool, Parameter(help="Do it; without, only say what would go.", negative="")] = False,
    older_than: Annotated[float, Parameter(help=OLDER_THAN)] = 24.0,
    keep_versions: Annotated[
        int | None, Parameter(converter=whole, help="Give up all versions but the newest so many.")
    ] = None,
    erase_retired: Annotated[
        bool, Parameter(help="Leave no committed byte of retired rows; give up earlier versions.", negative="")
    ] = False,
    as_json: Json = False,
) -> int:
    """Remove what no version names: abandoned fragments, leftovers of killed writers."""
    from functa.storage.places.address import open_location
    from functa.storage.upkeep.gc import collect

    if not older_than >= 0 or (keep_versions is not None and keep_versions < 1):
        raise ConfigError("--older-than is 0 or more hours, --keep-versions 1 or more")
    done = collect(
        open_location(functaset_of(uri)),
        delete=delete, older_than=3600 * older_than, keep_versions=keep_versions, erase_retired=erase_retired,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    from functa.flows.cli.tables import print_collected

    print_collected(done)
    return 0


@store.command
def quantize(
    source: Functaset,
    destination: Annotated[str, Parameter(help="Where the new functaset goes: an empty folder or s3://.")],
    *,
    bits: Annotated[
        int, Parameter(converter=whole, help="1 to 8 bits a latent number.", validator=validators.Number(gte=1, lte=8))
    ],
    ranges: Annotated[
        Literal["minmax", "sigma", "quantile"],
        Parameter(name="--range", help="Range of the bins, of training latents."),
    ] = "minmax",
    sigma: Annotated[float, Parameter(help="For --range sigma: mean +- this many standard deviations.")] = 6.0,
    quantile: Annotated[float, Parameter(help="For --range quantile: from this one to one minus it.")] = 0.001,
    granularity: Annotated[
        Literal["scalar", "channel", "element"], Parameter(help="One range in all, per channel or latent element.")
    ] = "element",
    codec: Annotated[Literal["zstd", "exact"], Parameter(help="Entropy coded, or exactly BITS bits.")] = "zstd",
    max_clip_fraction: Annotated[float, Parameter(help="More numbers outside the range fail a shard.")] = 0.01,
    as_json: Json = False,
) -> int:
    """Quantise a functaset into a new one, without the images. Rerun to continue."""

    config = {
        "bits": bits, "range": ranges, "sigma": sigma, "quantile": quantile, "granularity": granularity,
        "codec": codec, "max_clip_fraction": max_clip_fraction,
    }  # fmt: skip
    told = _quantize(functaset_of(source), destination, config)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        from functa.flows.cli.tables import print_functaset

        print_functaset(destination, told)
    return 0


@store.command
def hydrate(
    uri: Functaset,
    *,
    to: Annotated[str | None, Parameter(help="Folder; default: ~/.cache/functa/hydrated, where readers look.")] = None,
    as_json: Json = False,
) -> int:
    """Copy a remote or compressed functaset's rows into raw files on this machine, to be memory-mapped; resumable."""
    from functa.flows.cli.progress import shard_progress
    from functa.storage.functaset.functaset import Functaset as Store
    from functa.storage.readers.hydrate import hydrate as hydrate_store

    done = hydrate_store(Store.open(functaset_of(uri)), to, shard_progress("hydrating"))
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    else:
        stood = done.shards - done.written
        print(f"{done.folder}: {done.written} shards written ({done.bytes / 1e6:.0f} MB), {stood} stood already")
    return 0


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text("" if not task.speed else f"{task.speed:.0f} rows/s")


def _quantize(source: str, destination: str, options: dict[str, Any]) -> dict[str, Any]:
    """Writes the new functaset and returns its `store info`. Raises ConfigError for options out of bounds."""
    try:
        config = QuantizationConfig(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {fault['input']}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None
    columns = (TextColumn("quantising"), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    place = open_location(destination)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("rows", total=None)
        requantize(Store.open(source), place, config, lambda done, rows: bars.update(bar, completed=done, total=rows))
    return Store.open(place).info()
