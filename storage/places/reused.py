"""Locations outside a root that its records name: outputs of another root, and the images that it was made of.

A root may come from a stranger, and its records could name any folder or bucket. They count where this user let the
root use them: who reuses another root's stages names that root (--from), who encodes names the images. This is
remembered per user, in $XDG_DATA_HOME/functa/reused, a file for each pair of root and location.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from functa.storage.errors import StorageError
from functa.storage.places.address import below, is_address, open_location
from functa.storage.places.allowed import ALLOWED_ROOTS
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Location

_allowed: set[Path] = set()  # by this process, also where its user's folder cannot be written


class NotReused(StorageError):
    """A root's record names a place outside the root that this user has never let it reuse."""


def allow_reuse(root: Location, output: str, of: Location | None = None) -> None:
    """Remember that this user lets the root read an output of another one; if `of` is given, only one of that root."""
    found = open_location(output)
    note = _note(root, found)
    if note in _allowed or (of is not None and not _is_below(found, of)):
        return
    _allowed.add(note)
    with suppress(OSError):  # then --from is needed again
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.write_text(f"{root.uri}\n{found.uri}\n", errors="surrogateescape")


def was_allowed(root: Location, text: str) -> bool:
    """Return whether this user has let the root use this location."""
    note = _note(root, open_location(text))
    return note in _allowed or note.exists()


def output_of(root: Location, text: str) -> Location:
    """Return the location that a root's record names: a path below the root, or one that it may reuse.

    Raises NotReused, or StorageError for what is no path.
    """
    found = below(root, text)
    if not is_address(text) or _is_below(found, root):
        return found
    note = _note(root, found)
    by_operator = bool(os.environ.get(ALLOWED_ROOTS))  # who names the locations of this worker: this is in one of them
    if not by_operator and note not in _allowed and not note.exists():
        raise NotReused(
            f"{root.uri}: its record names {found.uri}, which lies outside this root and was never reused here by "
            f"this user; if you trust it, run `functa run PRESET --root {root.uri} --from` with the root that it is in"
        )
    return found


def refuse_link_out(root: Location, output: str) -> None:
    """Raise StorageError if a symbolic link leads a path below a local root out of it: nothing is written there."""
    if not isinstance(root, LocalLocation):
        return
    found, top = os.path.realpath(below(root, output).uri), os.path.realpath(root.uri)
    if os.path.commonpath([top, found]) != top:
        raise StorageError(f"{root.uri}/{output}: a symbolic link leads out of {root.uri}; remove the link")


def _is_below(location: Location, root: Location) -> bool:
    return location.uri.startswith(f"{root.uri.rstrip('/')}/")


def _note(root: Location, output: Location) -> Path:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    name = hashlib.sha256(f"{root.uri}\0{output.uri}".encode(errors="surrogatepass")).hexdigest()[:32]
    return Path(f"{data}/functa/reused/{name}").expanduser()
