"""`functa store ...`: looking into a functaset, checking, thinning and copying it."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from flows.arguments import whole
from flows.config import ConfigError

store = App(name="store", help="Look into a functaset, check it, thin it out, copy it.")

OLDER_THAN = "Hours since the last change of what was never committed; less than a run takes can cost its work."
Split = Annotated[Literal["train", "test"], Parameter(help="Which of the two.")]
Functaset = Annotated[str, Parameter(help="A functaset's URI, or the root of the run that encoded it.")]
Json = Annotated[bool, Parameter(name="--json", help="One JSON document.", negative="")]


@store.command
def info(uri: Functaset, *, as_json: Json = False) -> int:
    """Rows, versions, shapes, bits, PSNR, bytes, fingerprint."""
    from storage.functaset import Functaset as Store

    told = Store.open(functaset_of(uri)).info()
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        from flows.console import print_functaset

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
    from storage.locations import open_location
    from storage.verification import verify as verify_store

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
    from storage.committing import retire as retire_images
    from storage.locations import open_location

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
    from storage.collection import collect
    from storage.locations import open_location

    if not older_than >= 0 or (keep_versions is not None and keep_versions < 1):
        raise ConfigError("--older-than is 0 or more hours, --keep-versions 1 or more")
    done = collect(
        open_location(functaset_of(uri)),
        delete=delete, older_than=3600 * older_than, keep_versions=keep_versions, erase_retired=erase_retired,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    from flows.console import print_collected

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
    from flows.quantize import quantize as write

    config = {
        "bits": bits, "range": ranges, "sigma": sigma, "quantile": quantile, "granularity": granularity,
        "codec": codec, "max_clip_fraction": max_clip_fraction,
    }  # fmt: skip
    told = write(functaset_of(source), destination, config)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        from flows.console import print_functaset

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
    from flows.console import shard_progress
    from storage.functaset import Functaset as Store
    from storage.hydrate import hydrate as hydrate_store

    done = hydrate_store(Store.open(functaset_of(uri)), to, shard_progress("hydrating"))
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    else:
        stood = done.shards - done.written
        print(f"{done.folder}: {done.written} shards written ({done.bytes / 1e6:.0f} MB), {stood} stood already")
    return 0


def functaset_of(uri: str) -> str:
    """A run's root stands for its functaset, wherever that lies: `--from` leaves it in the root that lent it."""
    from storage.locations import open_location
    from storage.stages import output_location, read_record

    location = open_location(uri)
    record = read_record(location, "encode")
    return uri if record is None else output_location(record, location).uri
