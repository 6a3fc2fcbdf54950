"""Write an export of a root, a functaset or a store of photographs into a folder or a repository of the hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from functa.storage.errors import FunctaError
from functa.storage.functaset.records import ObjectRecord, vouch
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.publish.hub import HubAddress, HubTarget, check_writable, hub_address
from functa.storage.publish.manifest import CARD, LICENCE, MANIFEST, Kind, Layout, Manifest, read_manifest
from functa.storage.publish.target import FolderTarget, Target, check_inside
from functa.storage.runs.stage_records import output_location, read_record
from functa.storage.runs.weights import read_description
from functa.tasks.report.publish.cards import About, data_card, model_card
from functa.tasks.report.publish.contents import Contents, contents_of, exported_again, latents_of
from functa.tasks.report.publish.metadata import metadata

Progress = Callable[[int, int], None]


class ExportRefused(FunctaError):
    """The request lacks something or contradicts itself."""

    exit_status = 2


@dataclass(frozen=True)
class Request:
    """Source, destination and options of an export."""

    source: str
    to: str
    licence: str | None = None
    private: bool = False
    replaces: bool = False
    layout: Layout | None = None  # of latents alone; None: a functaset as it is


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    address: str
    kind: Kind
    files: int
    bytes: int


def export(request: Request, progress: Progress = lambda done, of: None) -> Exported:
    """Write an export; `progress` is called with (files done, files). Run again, it continues.

    Functasets are read and checked first, every object; only then anything is written. Raises ExportRefused: no
    licence; StorageError: nothing to export, damaged, the destination is taken, the hub does not answer or refuses.
    """
    hub = hub_address(request.to)
    if hub is None and (request.private or request.replaces):
        option = "--private" if request.private else "--replace"
        raise ExportRefused(f"{option}: is for repositories of the hub (hf://USER/NAME); leave it out")
    location = open_location(request.source)
    if hub is None:
        check_inside(location, open_location(request.to))
    else:
        check_writable(hub)
    before, data_only = read_manifest(location), hub is not None and hub.kind == "dataset"
    licence = _licence(request.licence, before)
    if request.layout:
        with latents_of(request.source, request.layout) as contents:
            return _write(request, contents, licence, hub, progress)
    if before and not (data_only and before.kind == "root"):  # a part of it gets a card of its own
        contents, cards = exported_again(location, before), {path: location.read(path) for path in before.cards}
        return _write(request, contents, licence, hub, progress, cards)
    return _write(request, contents_of(request.source, data_only), licence, hub, progress)


def _write(
    request: Request, contents: Contents, licence: str, hub: HubAddress | None, progress: Progress,
    cards: dict[str, bytes] | None = None,
) -> Exported:  # fmt: skip
    """Write files, then cards and manifest. cards: those of an export that is exported again, else they are made."""
    address = None if hub is None else hub.of_kind("model" if contents.kind == "root" else "dataset")
    files = dict(contents.files)
    if cards is None:
        about = About(_name(request, address), str(address or "FOLDER"), licence, contents.kind,
                      [path for path in contents.files if path.startswith("images/")])  # fmt: skip
        cards = _cards(about, contents, open_location(request.source))
        found = metadata(about, contents, None if address is None else address.url)
        files |= {path: partial(bytes, data) for path, data in found.items()}
    names = [*files, *cards]
    target: Target = (
        FolderTarget(open_location(request.to), names) if address is None
        else HubTarget(address, names, request.private, request.replaces)
    )  # fmt: skip
    records = dict[str, ObjectRecord]()
    for path, read in files.items():
        data = read()
        target.put(path, data)
        records[path] = vouch(data)
        progress(len(records), len(files))
    manifest = Manifest(kind=contents.kind, licence=licence, files=records, cards=tuple(cards))
    target.finish(manifest.stored(f"{target.address}/{MANIFEST}"), cards)
    return Exported(target.address, contents.kind, len(records), manifest.size)


def _licence(asked: str | None, before: Manifest | None) -> str:
    if before is not None:
        if asked not in (None, before.licence):
            raise ExportRefused(f"--licence {asked}: this is an export under {before.licence} already; leave it out")
        return before.licence
    if asked is None:
        raise ExportRefused(
            "--licence is missing: a card without one lets nobody use what is published; name one by its SPDX "
            "identifier, such as CC-BY-4.0, which the images' own licences allow"
        )
    if not re.fullmatch(LICENCE, asked):
        raise ExportRefused(f"--licence {asked}: expected an SPDX identifier, such as CC-BY-4.0")
    return asked


def _name(request: Request, address: HubAddress | None) -> str:
    uri = address.repo if address else open_location(request.to).uri
    return uri.rstrip("/").rpartition("/")[2]


def _cards(about: About, contents: Contents, location: Location) -> dict[str, bytes]:
    if contents.kind != "root":
        return {CARD: data_card(about, contents.functasets, layout=contents.layout)}
    found = {CARD: model_card(about, location)}
    for folder, place in contents.functasets.items():
        found[f"{folder}/{CARD}"] = data_card(about, {folder: place}, _classes(location))
    return found


def _classes(root: Location) -> list[str]:
    """Return the names of the classes, which a classifier's weights have."""
    record = read_record(root, "train_classifier")
    described = read_description(output_location(record, root)) if record is not None else None
    return list((described or {}).get("class_names") or [])
