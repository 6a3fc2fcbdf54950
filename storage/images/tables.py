"""The image source `parquet`: tables with a column of images and one of labels, in .parquet or Arrow files.

Hugging Face's sets are such files: their image column holds {bytes, path}, and their metadata the class names.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from functa.storage.errors import StorageError, TransientError, one_line
from functa.storage.images.encoded import Original, encoded_by_key, encoded_images
from functa.storage.images.files import MAX_FILE_BYTES, BadImage
from functa.storage.images.layout import shown
from functa.storage.images.shards import Item, ShardsByKey, find_shards, open_parts, rows_of_items, shards_location
from functa.storage.images.source import Images, SplitOfKeys
from functa.storage.places.local import LocalLocation
from functa.storage.places.location import Entry, Location

if TYPE_CHECKING:
    from functa.storage.config import ImagesConfig

ENDINGS = (".parquet", ".arrow")

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")

LABEL_COLUMNS = ("label", "fine_label", "cls", "class", "target", "labels")

HELD_BYTES = 512 << 20  # of decoded groups of rows


@dataclass(frozen=True)
class _Table:
    """A file of rows in groups, of which one is read at a time; columns and class names from its schema."""

    name: str
    columns: list[str]
    metadata: dict[bytes, bytes]
    counts: list[int]
    read: Any  # (group number, column) -> pyarrow.Array

    def column(self, chosen: str, known: Sequence[str], what: str) -> str | None:
        """Return the column that the setting names or, without one, the only known one; None if there is none."""
        if chosen:
            if chosen not in self.columns:
                raise StorageError(
                    f"{self.name}: has no column {chosen}, which images.columns names; it has {', '.join(self.columns)}"
                )
            return chosen
        found = [name for name in known if name in self.columns]
        if len(found) > 1:
            raise StorageError(f"{self.name}: columns {' and '.join(found)} may hold the {what}; set images.columns")
        return found[0] if found else None

    def class_names(self, column: str) -> list[str]:
        """Return the class names that Hugging Face's metadata give for a column; empty where there are none."""
        try:
            features = json.loads(self.metadata[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        except (KeyError, ValueError, TypeError):
            return []
        return [str(name) for name in names] if isinstance(names, list) else []


def open_parquet(config: "ImagesConfig") -> Images:
    """Return the images of tables. Raises StorageError: no such file or column, pyarrow is missing, damaged tables."""
    _check_pyarrow()
    location, shards = find_shards(config.location, ENDINGS, "parquet")
    image, _, label = config.columns.partition(",")
    items: dict[str, list[Item]] = {}
    columns: dict[str, str] = {}
    names: list[str] = []
    for split, entries in shards.items():
        items[split] = []
        for entry in entries:
            table = _open_table(location, entry)
            columns[entry.key] = _image_column(table, image)
            of_labels = table.column(label, LABEL_COLUMNS, "labels") if config.labels != "none" else None
            known = table.class_names(of_labels) if of_labels else []
            if names and known != names:
                raise StorageError(f"{table.name}: has other class names than the tables before it")
            names = known
            items[split] += _items(table, entry.key, of_labels)
    tokens = {entry.key: entry.token for entries in shards.values() for entry in entries}
    rows, classes, notes = rows_of_items(items, tokens, names, config.location, config.labels)
    groups = _Groups(location, {entry.key: entry for entries in shards.values() for entry in entries}, columns)
    return encoded_images(config, location, rows, classes, groups.fetch, notes)


def read_cells(config: "ImagesConfig", shape: tuple[int, int, int]) -> SplitOfKeys:
    """Return the function from keys to a split of these images; of the tables only those with such keys are opened."""
    _check_pyarrow()
    location = shards_location(config.location)
    groups = _Groups(location, {}, {})

    def origins(entry: Entry) -> dict[str, str]:
        table = _open_table(location, entry)
        groups.add(entry, _image_column(table, config.columns.partition(",")[0]))
        return {item.key: item.origin for item in _items(table, entry.key, None)}

    shards = ShardsByKey(location, ENDINGS, origins)
    return encoded_by_key(config, location, shape, lambda key: groups.fetch(shards.origin(key)))


def _check_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise StorageError("images.source=parquet needs pyarrow: pip install 'spatial-functa[parquet]'") from None


def _image_column(table: _Table, chosen: str) -> str:
    column = table.column(chosen, IMAGE_COLUMNS, "images")
    if column is None:
        raise StorageError(
            f"{table.name}: has no column {', '.join(IMAGE_COLUMNS)}; name it by images.columns=IMAGE,LABEL, of "
            f"{', '.join(table.columns)}"
        )
    return column


def _items(table: _Table, key: str, labels: str | None) -> list[Item]:
    """Return a table's rows as items; an origin is file, group and row in it."""
    items: list[Item] = []
    for group, count in enumerate(table.counts):
        values = _values(table, group, labels) if labels else [None] * count
        if len(values) != count:
            raise StorageError(f"{table.name}: a group of rows has {len(values)} rows and should have {count}")
        for row, value in enumerate(values):
            if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
                raise StorageError(
                    f"{table.name}, column {labels}: a label is text or a whole number, not {value!r:.80}"
                )
            label = None if value is None else str(value)
            items.append(Item(f"{shown(key)}/{len(items):08d}", label, f"{key}:{group}:{row}"))
    return items


class _Groups:
    """The rows of tables, read by groups, of which the last ones used are held."""

    def __init__(self, location: Location, entries: dict[str, Entry], columns: dict[str, str]) -> None:
        self._location, self._entries, self._columns = location, entries, columns
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, entry: Entry, column: str) -> None:
        """Let images of one more table be read, from this column."""
        self._entries[entry.key], self._columns[entry.key] = entry, column

    def fetch(self, origin: str) -> Original:
        """Return the bytes of one image."""
        key, group, row = origin.rsplit(":", 2)
        token = self._entries[key].token
        try:
            with self._lock:
                cell = self._group(key, int(group))[int(row)].as_py()
        except TransientError:
            raise  # the location did not answer, which makes no image bad
        except (StorageError, ValueError, IndexError) as error:
            raise BadImage(f"the table cannot be read there ({one_line(error)[:120]})", token) from None
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            where = f", only the path {cell['path']}" if isinstance(cell, dict) and cell.get("path") else ""
            raise BadImage(f"the table holds no bytes of this image{where}", token)
        if len(data) > MAX_FILE_BYTES:
            raise BadImage(f"more bytes than a file may have ({MAX_FILE_BYTES})", token)
        return Original(data, token)

    def _group(self, key: str, group: int) -> Any:
        if (key, group) not in self._held:
            now = self._location.entry(key)
            if now is None or now.token != self._entries[key].token:
                raise BadImage(f"{key} is another table than when it was listed", "" if now is None else now.token)
            table = _open_table(self._location, self._entries[key])
            self._held[key, group] = table.read(group, self._columns[key])
            while len(self._held) > 1 and sum(array.nbytes for array in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end((key, group))
        return self._held[key, group]


def _values(table: _Table, group: int, column: str) -> list[Any]:
    """Return a group's values of a column. Raises StorageError for bytes that are no text."""
    try:
        values: list[Any] = table.read(group, column).to_pylist()
        return values
    except ValueError as error:
        raise StorageError(f"{table.name}, column {column}: cannot be read ({one_line(error)[:120]})") from None


def _open_table(location: Location, entry: Entry) -> _Table:
    """Open a table; of Parquet no row is read yet. Raises StorageError for what is none."""
    import pyarrow

    name = f"{location.uri}/{entry.key}"
    local, is_arrow = isinstance(location, LocalLocation), entry.key.lower().endswith(".arrow")
    if is_arrow and not local:
        raise StorageError(f"{name}: Arrow files are read from local disk only; copy it here, or write Parquet")
    try:
        if is_arrow:
            return _arrow(name, pyarrow.memory_map(name))  # else every look at it would read it whole
        file = pyarrow.OSFile(name) if local else pyarrow.PythonFile(open_parts(location, entry), "r")
        return _parquet(name, file)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{name}: is no table that can be read ({one_line(error)[:120]})") from None


def _parquet(name: str, source: Any) -> _Table:
    from pyarrow import ArrowException, parquet

    file = parquet.ParquetFile(source)
    schema = file.schema_arrow
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def read(group: int, column: str) -> Any:
        try:
            return file.read_row_group(group, columns=[column]).column(column).combine_chunks()
        except (ArrowException, OSError, ValueError) as error:
            raise StorageError(f"{name}: a group of rows cannot be read ({one_line(error)[:120]})") from None

    return _Table(name, schema.names, dict(schema.metadata or {}), counts, read)


def _arrow(name: str, source: Any) -> _Table:
    from pyarrow import ArrowInvalid, ipc

    try:
        batches = list(ipc.open_stream(source))
        schema = batches[0].schema if batches else ipc.open_stream(source).schema
    except ArrowInvalid:
        source.seek(0)
        file = ipc.open_file(source)
        schema, batches = file.schema, [file.get_batch(i) for i in range(file.num_record_batches)]
    return _Table(
        name, schema.names, dict(schema.metadata or {}), [batch.num_rows for batch in batches],
        lambda group, column: batches[group].column(column),
    )  # fmt: skip
