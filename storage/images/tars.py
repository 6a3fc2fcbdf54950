"""The image source `webdataset`: tars whose members a/b.jpg, a/b.cls, a/b.json, a/b.txt are one sample, `a/b`.

A tar is indexed once, by reading it through, and the images' offsets are kept. An image is then one read of a part.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from functa.storage.errors import StorageError
from functa.storage.images.encoded import Original, encoded_by_key, encoded_images
from functa.storage.images.files import ENDINGS, MAX_FILE_BYTES, BadImage, is_hidden, left_out
from functa.storage.images.layout import shown
from functa.storage.images.shards import Item, ShardsByKey, find_shards, open_parts, rows_of_items, shards_location
from functa.storage.images.source import Images, SplitOfKeys, read_threads
from functa.storage.places.address import read_json, write_json
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig

LABEL_FIELDS = ("label", "cls", "class")  # of a sample's .json, which counts where there is no .cls

COMPANIONS = (".txt", ".cls", ".json")  # of an image: captions, labels

MAX_HEADER_BYTES = 1 << 20  # of a member's name and attributes

MAX_LABEL_BYTES = 1 << 20

MAX_INDEX_BYTES = 1 << 30

CUT = "cut"  # length of an image that the end of its tar cuts off


def open_webdataset(config: "ImagesConfig") -> Images:
    """Return the images of tars. Raises StorageError: none there, a tar that is none, labels of only some images."""
    location, shards = find_shards(config.location, (".tar",), "webdataset")
    columns = tuple(config.columns.split(",")) if config.columns else ()
    items: dict[str, list[Item]] = {}
    notes: list[str] = []
    with ThreadPoolExecutor(read_threads()) as pool:
        for split, entries in shards.items():
            indexed = list(pool.map(lambda entry: _known_index(location, entry, columns), entries))
            items[split] = [item for of_tar, _ in indexed for item in of_tar]
            notes += [note for _, of_tar in indexed for note in of_tar]
    tokens = {entry.key: entry.token for entries in shards.values() for entry in entries}
    if notes and not any(items.values()):
        raise StorageError(f"{config.location}: its shards hold no image; {notes[0]}")
    rows, classes, more = rows_of_items(items, tokens, (), config.location, config.labels)

    return encoded_images(config, location, rows, classes, partial(_fetch, location, tokens), (*notes, *more))


def read_members(config: "ImagesConfig", shape: tuple[int, int, int]) -> SplitOfKeys:
    """Return the function from keys to a split of these images; of the tars only those with such keys are indexed."""
    columns = tuple(config.columns.split(",")) if config.columns else ()
    location = shards_location(config.location)
    tokens: dict[str, str] = {}

    def origins(entry: Entry) -> dict[str, str]:
        tokens[entry.key] = entry.token
        return {item.key: item.origin for item in _known_index(location, entry, columns)[0]}

    shards = ShardsByKey(location, (".tar",), origins)
    return encoded_by_key(config, location, shape, lambda key: _fetch(location, tokens, shards.origin(key)))


def _fetch(location: Location, tokens: Mapping[str, str], origin: str) -> Original:
    """Return an image's bytes; tokens: of each tar as it was indexed."""
    key, start, length = origin.rsplit(":", 2)
    token = tokens[key]
    if length == CUT:
        raise BadImage(f"{key} ends before this image does; fetch the tar again", token)
    if int(length) > MAX_FILE_BYTES:
        raise BadImage(f"more bytes than a file may have ({MAX_FILE_BYTES})", token)
    found = location.versioned_part(key, int(start), int(length))
    if found is None or found[0].token != token:
        raise BadImage(f"{key} is another tar than when it was listed", "" if found is None else found[0].token)
    return Original(found[1], token)


def _known_index(location: Location, entry: Entry, columns: tuple[str, ...]) -> tuple[list[Item], list[str]]:
    """Return a tar's index, from this user's cache where this version of the tar was indexed before."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache = LocalLocation(os.path.abspath(folder)).child("functa", "tars")
    described = json.dumps([location.uri, entry.key, entry.size, entry.token, columns])
    name = f"{hashlib.sha256(described.encode()).hexdigest()}.json"
    with suppress(StorageError, ValueError, TypeError):  # not there, damaged, or no cache can be read
        items, notes = read_json(cache, name, MAX_INDEX_BYTES)
        return [Item(*item) for item in items], notes
    items, notes = index_tar(location, entry, columns)
    with suppress(StorageError):  # no cache can be written
        write_json(cache, name, [[[item.key, item.label, item.origin] for item in items], notes], MAX_INDEX_BYTES)
    return items, notes


def index_tar(location: Location, entry: Entry, columns: tuple[str, ...] = ()) -> tuple[list[Item], list[str]]:
    """Return a tar's images with their labels, and what the user should know of it.

    columns: the ending of the images, and the field of the .json that holds their labels; without them any known
    ending is an image, and the label is that of the .cls or, if there is none, a usual field of the .json. Raises
    StorageError for what is no tar, or two images of one sample.
    """
    name = f"{location.uri}/{entry.key}"
    endings, fields = ((f".{columns[0].lower()}",), columns[1:]) if columns else (ENDINGS, LABEL_FIELDS)
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    fallbacks: dict[str, str] = {}  # from .json, wherever it lies in the tar
    others: dict[str, str] = {}  # sample -> ending of what is not read
    notes = []
    try:
        for sample, ending, member, data in _members(location, entry):
            if ending in endings:
                if sample in images:
                    raise StorageError(f"{name}: sample {sample} has two images; name one by images.columns=png,label")
                whole = member.offset_data + member.size <= entry.size
                images[sample] = f"{entry.key}:{member.offset_data}:{member.size if whole else CUT}"
            elif ending == ".json" or (ending == ".cls" and not columns):
                label = _label(data(), ending, fields, f"{name}: {sample}{ending}")
                if label is not None:
                    (labels if ending == ".cls" else fallbacks)[sample] = label
            elif ending not in COMPANIONS:
                others.setdefault(sample, ending)
    except EOFError as error:
        last = next(reversed(images), "")
        if (labels or fallbacks) and last not in labels and last not in fallbacks:
            images.pop(last)  # its label came after it
        notes.append(f"{name}: {error}; its {len(images)} images before that are read; fetch the tar again")
    if note := left_out(f"x{ending}" for sample, ending in others.items() if sample not in images):
        notes.append(f"{name}: {note}")
    labels = fallbacks | labels
    shard = shown(entry.key)
    return [Item(f"{shard}/{sample}", labels.get(sample), origin) for sample, origin in images.items()], notes


def _members(location: Location, entry: Entry) -> Iterator[tuple[str, str, tarfile.TarInfo, Any]]:
    """Yield (sample, ending in lower case, member, function that reads it). Raises EOFError where it is cut off."""
    file, tar = open_parts(location, entry), None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            offset = -1
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else a list of all members is kept
                if member.size < 0 or tar.offset <= offset:  # a header that leads back would never end
                    raise EOFError(f"is damaged, at byte {member.offset}")
                offset = tar.offset
                base = member.name.rpartition("/")[2]
                if not member.isreg() or member.issparse() or is_hidden(member.name.removeprefix("./")):
                    continue
                stem, dot, ending = base.partition(".")
                sample = shown(member.name[: len(member.name) - len(base)].removeprefix("./") + stem)

                def data(member: tarfile.TarInfo = member) -> bytes:
                    file.seek(member.offset_data)
                    return file.read(min(member.size, MAX_LABEL_BYTES))

                yield sample, f"{dot}{ending}".lower(), member, data
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError(f"ends early or is damaged, at byte {min(tar.offset, entry.size)}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if tar is not None:
            raise EOFError(f"ends early or is damaged, at byte {min(tar.offset, entry.size)}") from None
        raise StorageError(
            f"{location.uri}/{entry.key}: is no tar ({error}); a compressed tar must be unpacked"
        ) from None


def _label(data: bytes, ending: str, fields: tuple[str, ...], name: str) -> str | None:
    """Return a sample's label: the text of its .cls, or a field of its .json."""
    try:
        text = data.decode()
        if ending == ".cls":
            value: Any = text.strip()
        else:
            parsed = json.loads(text)
            value = (
                next((parsed[field] for field in fields if field in parsed), None) if isinstance(parsed, dict) else None
            )
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{name}: is not {'text' if ending == '.cls' else 'JSON'} ({str(error)[:80]})") from None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise StorageError(f"{name}: a label is text or a whole number, not {value!r:.80}")
    return str(value)
