"""Locations that name several files: `train-{000..127}.tar`, `*.parquet`, `{train,val}`, local or in a bucket."""

import os
import re
from itertools import product

import numpy as np

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.location import Entry, Listing, Location

MAX_NAMES = 1_000_000  # that the braces of a pattern may mean

_SPECIAL = re.compile(r"[{*?]")

_BRACES = re.compile(r"\{([^{}]*)\}")

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def select(uri: str) -> tuple[Location, list[Entry]]:
    """Return the location above all special characters, and the entries there that the pattern or folder names.

    Braces list names or count, `*` and `?` match within a name; what lies below a folder that matches counts too.
    Raises StorageError for a pattern that is malformed, or names files that are not there.
    """
    base, pattern = split_pattern(uri)
    location = open_location(base)
    if not pattern:
        return location, location.entries()
    names = _Names(pattern.strip("/"))
    chosen = [entry for entry in location.entries(names.beginning) if names.match(entry.key)]
    names.check(location, uri)
    return location, chosen


def select_listing(uri: str) -> tuple[Location, Listing]:
    """Return the same as a listing, for very many objects."""
    base, pattern = split_pattern(uri)
    location = open_location(base)
    if not pattern:
        return location, location.listing()
    names = _Names(pattern.strip("/"))
    found = location.listing(names.beginning)
    rows = np.flatnonzero([names.match(key) for key in found.keys])
    names.check(location, uri)
    return location, found.take(rows)


class _Names:
    """The names that a pattern means; beginning: that of all of them, up to a folder."""

    def __init__(self, pattern: str) -> None:
        names = expand_braces(pattern)
        first, last = min(names), max(names)
        shared = next((i for i, pair in enumerate(zip(first, last)) if len({*pair}) > 1), len(first))
        folder = _SPECIAL.split(first[:shared], maxsplit=1)[0].rpartition("/")[0]
        self.beginning = f"{folder}/" if folder else ""
        self._exact = {name for name in names if not _SPECIAL.search(name)}
        self._wild = _as_regex(pattern) if len(self._exact) < len(names) else None
        self._depth = pattern.count("/") + 1
        self._seen: set[str] = set()

    def match(self, key: str) -> bool:
        """Return whether the pattern names the object, or a folder that it lies in."""
        name = "/".join(key.split("/")[: self._depth])
        if name in self._exact:
            self._seen.add(name)
            return True
        return self._wild is not None and self._wild.fullmatch(name) is not None

    def check(self, location: Location, uri: str) -> None:
        """Raise StorageError if a name without special characters has matched nothing."""
        if missing := sorted(self._exact - self._seen):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise StorageError(f"{location.uri}/{missing[0]}{more}: is missing, and the pattern {uri} names it")


def split_pattern(uri: str) -> tuple[str, str]:
    """Return the part of a location before its first name with a special character, and the pattern from there on.

    A local path that exists as it is has no pattern, whatever characters its name has.
    """
    if not _SPECIAL.search(uri) or ("://" not in uri and os.path.exists(os.path.expanduser(uri))):
        return uri, ""
    parts = uri.split("/")
    first = next(i for i, part in enumerate(parts) if _SPECIAL.search(part))
    if "://" in uri and first < 3:
        raise StorageError(f"{uri}: a bucket's name cannot be a pattern")
    return "/".join(parts[:first]) or ("/" if uri.startswith("/") else "."), "/".join(parts[first:])


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with braces means: {000..127} counts, {a,b} lists. Raises StorageError."""
    pieces = _BRACES.split(pattern)  # text, braces, text, braces, ..., text
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise StorageError(f"{pattern}: braces do not match; write {{000..127}} or {{train,val}}")
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    count = 1
    for each in choices:
        count *= len(each)
    if count > MAX_NAMES:
        raise StorageError(f"{pattern}: means {count} names, more than {MAX_NAMES}; use * instead")
    return ["".join(each) for each in product(*choices)]


def _choices(braces: str) -> list[str]:
    found = _RANGE.fullmatch(braces)
    if found is None:
        return braces.split(",")
    first, last = found.groups()
    if not int(first) <= int(last) <= int(first) + MAX_NAMES:
        raise StorageError(f"{{{braces}}}: expected two numbers in rising order, at most {MAX_NAMES} apart")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _as_regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern: `*` and `?` match no slash, braces one of their choices."""
    marks = {"*": "[^/]*", "?": "[^/]"}
    pieces = [
        "".join(marks.get(char, re.escape(char)) for char in piece) if i % 2 == 0 else f"(?:{_any_of(piece)})"
        for i, piece in enumerate(_BRACES.split(pattern))
    ]
    return re.compile("".join(pieces))


def _any_of(braces: str) -> str:
    return "|".join(_as_regex(choice).pattern for choice in _choices(braces))
