"""Labels of images that lie in no class folders: a table of file names and labels, and numbers for them."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.places.address import open_location

MAX_BYTES = 1 << 30

MAX_CLASS = 1_000_000

FILE_NAMES = ("file", "file_name", "filename", "image", "path", "key")

LABEL_NAMES = ("label", "class", "cls", "target")


def read_labels(uri: str) -> dict[str, str]:
    """Return {file name: label} of a .csv, .tsv or .jsonl file: columns file and label, with or without a header.

    Raises StorageError for another format, a row without both, or a file that is named twice.
    """
    folder, _, name = uri.rpartition("/")
    ending = PurePosixPath(name).suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl"):
        raise StorageError(f"images.labels={uri}: expected a .csv, .tsv or .jsonl file with columns file and label")
    data = open_location(folder or ("/" if uri.startswith("/") else ".")).read(name, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedObject(f"{uri}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = _json_rows(text, uri) if ending == ".jsonl" else _table_rows(text, uri, "\t" if ending == ".tsv" else ",")
    labels: dict[str, str] = {}
    for line, file, label in rows:
        if labels.setdefault(file, label) != label:
            raise StorageError(f"{uri}, line {line}: {file} has label {label} here and {labels[file]} above")
    if not labels:
        raise StorageError(f"{uri}: names no image; expected rows of file and label")
    return labels


def _table_rows(text: str, uri: str, delimiter: str) -> list[tuple[int, str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    file, label = 0, 1
    rows: list[tuple[int, str, str]] = []
    try:
        for line, row in enumerate(reader, 1):
            if not any(cell.strip() for cell in row):
                continue
            header = _header(row) if line == 1 else None
            if header is not None:
                file, label = header
                continue
            if len(row) <= max(file, label) or not row[file].strip() or not row[label].strip():
                raise StorageError(f"{uri}, line {line}: expected a file and a label, got {row!r:.80}")
            rows.append((line, row[file].strip(), row[label].strip()))
    except csv.Error as error:
        raise StorageError(f"{uri}, line {reader.line_num}: is not a table of file and label ({error})") from None
    return rows


def _header(row: list[str]) -> tuple[int, int] | None:
    """Return the columns of file and label where a row names both, or None for a row of data."""
    names = [cell.strip().lower() for cell in row]
    files, labels = ([i for i, name in enumerate(names) if name in known] for known in (FILE_NAMES, LABEL_NAMES))
    return (files[0], labels[0]) if files and labels else None


def _json_rows(text: str, uri: str) -> list[tuple[int, str, str]]:
    rows = []
    for line, part in enumerate(text.splitlines(), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
            file = next(value[name] for name in FILE_NAMES if name in value)
            label = next(value[name] for name in LABEL_NAMES if name in value)
        except (ValueError, TypeError, StopIteration, RecursionError):
            raise StorageError(f'{uri}, line {line}: expected {{"file": ..., "label": ...}}, got {part:.80}') from None
        if not isinstance(file, str) or not isinstance(label, str | int) or isinstance(label, bool):
            raise StorageError(f"{uri}, line {line}: file is text and label text or a whole number, got {part:.80}")
        rows.append((line, file, str(label)))
    return rows


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdigit() and len(label) < 20


def numbered(labels: Sequence[str], names: Sequence[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Return labels as int32 [n], and the class names.

    names: the classes by number, where the source lists them; labels are numbers then. Else labels that are all whole
    numbers are the classes 0 ... of the greatest, so that a class keeps its number whatever images come; other labels
    are numbered in their order. Raises ValueError for a number outside the classes, and for one
    that is written in two ways: two classes could be meant.
    """
    if names or all(map(_is_number, labels)):
        greatest = len(names) - 1 if names else MAX_CLASS
        wrong = next((label for label in labels if not _is_number(label) or not 0 <= int(label) <= greatest), None)
        if wrong is not None:
            hint = "; leave out images without labels, for shards by a pattern" if wrong == "-1" else ""
            raise ValueError(f"label {wrong:.40} is none of the classes 0 to {greatest}{hint}")
        spelt: dict[int, str] = {}
        for label in sorted(set(labels)):
            if spelt.setdefault(int(label), label) != label:
                raise ValueError(f"the labels {spelt[int(label)]} and {label} are one number; write them alike")
        numbers = np.array([int(label) for label in labels], np.int32)
        return numbers, list(names) or [str(number) for number in range(int(numbers.max(initial=-1)) + 1)]
    classes = sorted(set(labels))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[label] for label in labels], np.int32), classes
