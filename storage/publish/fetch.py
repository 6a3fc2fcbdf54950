"""Copy an export from a hub or a folder; every file is checked against the manifest before it is written."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from functa.storage.errors import MissingObject, StorageError
from functa.storage.functaset.records import read_vouched, vouch
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.publish.hub import hub_address, open_hub
from functa.storage.publish.manifest import MANIFEST, Manifest, read_manifest
from functa.storage.publish.target import FolderTarget, check_inside

DOWNLOADS = 8  # at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Origin:
    address: str
    manifest: Manifest
    read: Callable[[str], bytes]


def fetch(address: str, to: str, progress: Progress = lambda done, of: None) -> Manifest:
    """Copy an export into a folder or bucket; return its manifest. Run again, it continues.

    `progress` is called with (files done, files). Raises StorageError: no export there, damaged, unreachable, too large
    for the disk, the destination holds something else.
    """
    destination, origin = open_location(to), _origin(address)
    files, cards = origin.manifest.files, origin.manifest.cards
    if hub_address(address) is None:
        check_inside(open_location(address), destination)
    target = FolderTarget(destination, [*files, *cards])
    destination.preflight_write(origin.manifest.size)

    def copy(path: str) -> None:
        if not (destination.exists(path) and vouch(destination.read(path)) == files[path]):
            target.put(path, origin.read(path))

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        waiting = [pool.submit(copy, path) for path in files]
        try:
            for done, each in enumerate(waiting, 1):
                each.result()
                progress(done, len(files))
        finally:
            pool.shutdown(cancel_futures=True)
    target.finish(origin.manifest.stored(f"{target.address}/{MANIFEST}"), {path: origin.read(path) for path in cards})
    return origin.manifest


def _origin(address: str) -> _Origin:
    if hub := hub_address(address):
        found = open_hub(hub)
        return _Origin(str(found.address), found.manifest, found.read)
    location = open_location(address)
    manifest = read_manifest(location)
    if manifest is None:
        raise MissingObject(f"{address}: is no export (no {MANIFEST}); `functa export` makes one")
    return _Origin(location.uri, manifest, partial(_read, location, manifest))


def _read(location: Location, manifest: Manifest, path: str) -> bytes:
    if path in manifest.cards:
        return location.read(path)
    try:
        return read_vouched(location, path, manifest.files[path])
    except StorageError as error:
        raise type(error)(f"{str(error).partition(';')[0]}; ask its author to export it again") from None
