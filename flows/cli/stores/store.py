"""`functa store ...`: inspect, check, clean and copy a functaset."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter, validators
from pydantic import ValidationError

from functa.flows.cli.arguments import LOOK, Functaset, Json, Split, functaset_of, own_functaset_of, whole
from functa.flows.cli.progress import ProgressLine
from functa.flows.config.schema import ConfigError
from functa.flows.server.console import print_line
from functa.storage.config import QuantizationConfig
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import read_record
from functa.tasks.inference.photographs.store import functasets_of_store

store = App(name="store", group=LOOK, help="Inspect, check, clean and copy a functaset.")

OLDER_THAN = "Hours since the last change of uncommitted objects; fewer than a run takes can destroy its work."


@store.command
def info(uri: Functaset, *, as_json: Json = False) -> int:
    """Rows, versions, shapes, bits, PSNR, bytes, fingerprint."""
    from functa.storage.functaset.functaset import Functaset as Store

    found = Store.open(functaset_of(uri)).info()
    _print_info(uri, found, as_json, _measured(uri, found["content"]))
    return 0


def _measured(uri: str, content: str) -> float | None:
    """Return the test PSNR that the root's evaluation of this content measured; None for none, or where no root is."""
    record = read_record(open_location(uri), "evaluate")
    return record.figures.get("psnr_test") if record is not None and record.inputs.get("encode") == content else None


def _print_info(uri: str, found: dict[str, Any], as_json: bool, measured: float | None = None) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from functa.flows.cli.tables import print_functaset

    print_functaset(uri, found, measured)


@store.command
def verify(
    uri: Functaset,
    *,
    deep: Annotated[bool, Parameter(help="Read every object and check its checksum.", negative="")] = False,
    as_json: Json = False,
) -> int:
    """Check a functaset, or those of a store of photographs, against its receipts; status 1 names every bad object."""
    from functa.storage.upkeep.verify import verify as verify_store

    checked, found = 0, list[dict[str, Any]]()
    store = functasets_of_store(uri)
    for each in store or [functaset_of(uri)]:
        report = verify_store(open_location(each), deep=deep)
        below = each.rpartition("/")[2] + "/" if store else ""
        checked += report.checked
        found += [bad | {"path": f"{below}{bad['path']}"} for bad in report.bad]
    if as_json:
        print(json.dumps({"checked": checked, "bad": found}, indent=1))
    else:
        for bad in found:
            print_line(f"{bad['path']}: {bad['fault']}")
        print(f"{checked} objects checked, {len(found)} bad")
    return 1 if found else 0


@store.command
def retire(uri: Functaset, *keys: Annotated[str, Parameter(help="The images' keys.")], split: Split = "train") -> int:
    """Hide the rows of some images; their bytes remain until gc --erase-retired."""
    from functa.storage.functaset.commit import retire as retire_images

    if not keys:
        raise ConfigError("KEYS: name one image at least, by its key in the functaset")
    made = retire_images(open_location(own_functaset_of(uri)), split, keys)
    print(f"version {made.version} shows {sum(entry.rows for entry in made.fragments)} rows")
    return 0


@store.command
def gc(
    uri: Functaset,
    *,
    delete: Annotated[bool, Parameter(help="Do it; without, only list what would be collected.", negative="")] = False,
    older_than: Annotated[float, Parameter(help=OLDER_THAN)] = 24.0,
    keep_versions: Annotated[
        int | None, Parameter(converter=whole, help="Expire all versions but the newest N.")
    ] = None,
    erase_retired: Annotated[
        bool, Parameter(help="Erase the bytes of retired rows; expires earlier versions.", negative="")
    ] = False,
    as_json: Json = False,
) -> int:
    """Collect objects that no version names: abandoned fragments, leftovers of killed writers."""
    from functa.storage.upkeep.gc import collect

    if not older_than >= 0 or (keep_versions is not None and keep_versions < 1):
        raise ConfigError("--older-than is 0 or more hours, --keep-versions 1 or more")
    done = collect(
        open_location(own_functaset_of(uri) if delete else functaset_of(uri)),
        delete=delete, older_than=3600 * older_than, keep_versions=keep_versions, erase_retired=erase_retired,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    from functa.flows.cli.tables import print_collected

    print_collected(done)
    return 0


@store.command
def compact(uri: Functaset, *, as_json: Json = False) -> int:
    """Merge small fragments, as many small encodings leave them; no row changes. Rerun to continue."""
    from functa.storage.upkeep.compact import compact as compact_store

    with ProgressLine("compacting", "fragments") as show:
        done = compact_store(open_location(own_functaset_of(uri)), show)
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    elif not done.made:
        print("nothing to merge: of each split there is one small fragment at most")
    else:
        print(
            f"version {done.version}: {len(done.merged)} fragments of {done.rows} rows are now {len(done.made)}; "
            "functa store gc --keep-versions 1 --delete removes the old ones"
        )
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
    max_clip_fraction: Annotated[float, Parameter(help="More numbers outside the range are refused.")] = 0.01,
    as_json: Json = False,
) -> int:
    """Quantise a functaset into a new one, without the images. Rerun to continue."""
    config = {
        "bits": bits, "range": ranges, "sigma": sigma, "quantile": quantile, "granularity": granularity,
        "codec": codec, "max_clip_fraction": max_clip_fraction,
    }  # fmt: skip
    _print_info(destination, _quantize(functaset_of(source), destination, config), as_json)
    return 0


@store.command
def hydrate(
    uri: Functaset,
    *,
    to: Annotated[str | None, Parameter(help="Folder; default: ~/.cache/functa/hydrated, where readers look.")] = None,
    as_json: Json = False,
) -> int:
    """Copy a remote or compressed functaset's rows into raw files on this machine, to be memory-mapped; resumable."""
    from functa.storage.functaset.functaset import Functaset as Store
    from functa.storage.readers.hydrate import hydrate as hydrate_store

    with ProgressLine("hydrating", "shards") as show:
        done = hydrate_store(Store.open(functaset_of(uri)), to, show)
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    else:
        present = done.shards - done.written
        print_line(f"{done.folder}: {done.written} shards written ({done.bytes / 1e6:.0f} MB), {present} already there")
    return 0


def _quantize(source: str, destination: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the new functaset and return its `store info`. Raises ConfigError for options out of bounds."""
    try:
        config = QuantizationConfig(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {fault['input']}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None
    from functa.storage.functaset.functaset import Functaset as Store
    from functa.storage.upkeep.requantize import requantize

    location = open_location(destination)
    with ProgressLine("quantising", "rows") as show:
        requantize(Store.open(source), location, config, show)
    return Store.open(location).info()
