"""Many short texts in little memory: keys and tokens of millions of images."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import overload

import numpy as np

CHUNK = 1 << 13  # texts that are unpacked at once

PLAIN = bytes({*range(0x20, 0x7F)} - {*b'"\\'} | {0})  # what JSON writes as it is, and the end

END = "\0"  # after each text, so that many are unpacked by one split; a text may have it too

MARGIN = 8  # bytes before the first text and, as many as the longest has, after the last: windows never end outside

SPARSE = 4  # times the bytes of texts that windows of equal width may take


class Texts(Sequence[str]):
    """A sequence of texts as one block of UTF-8, with 8 bytes for the place of each (12 in a block of 2 GiB and more).

    Those that are taken from others share their block.
    """

    def __init__(self, block: bytes, starts: np.ndarray, lengths: np.ndarray, plain: bool) -> None:
        self._block, self._starts, self._lengths = block, starts, lengths
        self._plain = plain  # no text has a character that JSON writes in another way

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return these texts, in order."""
        if isinstance(texts, Texts):
            return texts
        packing, source = Packing(), iter(texts)
        while chunk := list(islice(source, CHUNK)):
            packing.add(chunk)
        return packing.packed()

    def _of(self, starts: np.ndarray, lengths: np.ndarray) -> "Texts":
        return Texts(self._block, starts, lengths, self._plain)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "str | Texts":
        if isinstance(index, slice):
            return self._of(self._starts[index], self._lengths[index])
        start = int(self._starts[index])
        return self._block[start : start + int(self._lengths[index])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for chunk in self.chunks():
            yield from chunk

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: np.ndarray) -> "Texts":
        """Return these rows, in this order."""
        return self._of(self._starts[rows], self._lengths[rows])

    def repeat(self, times: int) -> "Texts":
        """Return each text that often, side by side."""
        if times == 1:
            return self
        return self._of(np.repeat(self._starts, times), np.repeat(self._lengths, times))

    def begins(self) -> np.ndarray:
        """Return bool [n]: False where a text is the same place in the block as the one before it."""
        begins = np.ones(len(self), bool)
        begins[1:] = self._starts[1:] != self._starts[:-1]
        return begins

    def bytes_at(self, places: np.ndarray) -> np.ndarray:
        """Return of each text its byte at a place, uint8 [n]: from its start, or from its end if negative.

        0 where the text has none there.
        """
        inside = np.where(places < 0, -places <= self._lengths, places < self._lengths)
        at = np.where(places < 0, self._starts + self._lengths, self._starts) + places
        return np.where(inside, np.frombuffer(self._block, np.uint8)[np.where(inside, at, 0)], 0)

    @property
    def is_plain(self) -> bool:
        """Return whether JSON has all characters as they are."""
        return self._plain

    def is_utf8(self) -> bool:
        """Return whether every text is valid as UTF-8, which names of files need not be."""
        try:
            return self._block.isascii() or bool(self._block.decode())
        except UnicodeDecodeError:
            return False

    def encoded(self) -> list[bytes]:
        """Return the UTF-8 of each text."""
        if not len(self):
            return []
        block, starts, stops = self._block, self._starts, self._starts + self._lengths
        if (starts[1:] == stops[:-1] + 1).all():
            texts = block[starts[0] : stops[-1]].split(b"\0")
            if len(texts) == len(self):
                return texts
        return [block[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def tails(self, width: int) -> np.ndarray:
        """Return the last bytes of each text, uint8 [n, width], at most MARGIN; before a shorter text lies a 0."""
        return self._windows(width)[self._starts + self._lengths - width]

    def joined(self) -> bytes:
        """Return the UTF-8 of all texts one after the other, each with a 0 behind it."""
        width = int(self._lengths.max(initial=0)) + 1
        if width * len(self) > SPARSE * (int(self._lengths.sum()) + len(self)):
            return b"".join([text + b"\0" for text in self.encoded()])
        windows = self._windows(width)[self._starts]
        return windows[np.arange(width) <= self._lengths[:, None]].tobytes()

    def _windows(self, width: int) -> np.ndarray:
        """Return the bytes at each place of the block and after it, a view uint8 [places, width]."""
        return np.lib.stride_tricks.sliding_window_view(np.frombuffer(self._block, np.uint8), width)

    def chunks(self) -> Iterator[list[str]]:
        """Yield the texts in lists of at most CHUNK."""
        for start in range(0, len(self), CHUNK):
            yield self[start : start + CHUNK].unpacked()

    def unpacked(self) -> list[str]:
        """Return the texts as a list."""
        return [data.decode("utf-8", "surrogatepass") for data in self.encoded()]


class Packing:
    """Makes Texts of lists that come one after the other."""

    def __init__(self) -> None:
        self._block, self._lengths, self._plain = bytearray(MARGIN), [np.zeros(0, np.int32)], True

    def add(self, texts: list[str], prefix: str = "") -> None:
        """Append these texts, each after the prefix."""
        if not texts:
            return
        block = _encoded(prefix + (END + prefix).join(texts)) + b"\0"
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0).astype(np.int32)
        if len(ends) == len(texts):
            lengths = np.diff(ends, prepend=np.int32(-1)) - np.int32(1)
        else:  # some have the mark of the end themselves
            lengths = np.array([len(_encoded(prefix + text)) for text in texts], np.int32)
        self._plain &= len(ends) == len(texts) and not block.translate(None, PLAIN)
        self._lengths.append(lengths)
        self._block += block

    def packed(self) -> Texts:
        """Return all texts that were added; nothing is kept here."""
        lengths = np.concatenate(self._lengths)
        starts = np.cumsum(lengths + np.int64(1))
        starts -= lengths
        starts += MARGIN - 1
        if len(self._block) < 1 << 31:
            starts = starts.astype(np.int32)
        self._block += bytes(int(lengths.max(initial=0)))
        block, self._block = bytes(self._block), bytearray(MARGIN)
        return Texts(block, starts, lengths, self._plain)


class Index:
    """Finds texts among many different ones, by their sorted hashes; 16 bytes for each."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def find(self, wanted: Sequence[str]) -> np.ndarray:
        """Return the place of each wanted text, int64 [n]; -1 where it is none of them."""
        hashes = np.fromiter(map(hash, wanted), np.int64, len(wanted))
        first = np.searchsorted(self._hashes, hashes)
        known = np.flatnonzero(first < len(self._hashes))
        known = known[self._hashes[first[known]] == hashes[known]]
        found = np.full(len(wanted), -1, np.int64)
        found[known] = self._order[first[known]]
        for at in known[~equal(taken(self._texts, found[known]), taken(wanted, known))].tolist():
            found[at] = self._next(int(first[at]), wanted[at])  # another text has that hash
        return found

    def _next(self, first: int, wanted: str) -> int:
        for place in range(first, len(self._hashes)):
            if self._hashes[place] != self._hashes[first]:
                break
            if self._texts[int(self._order[place])] == wanted:
                return int(self._order[place])
        return -1


def equal(some: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Return bool [n]: which texts are the same on both sides."""
    left, right = list(encoded(some)), list(encoded(others))
    if left == right:
        return np.ones(len(left), bool)
    return np.fromiter((one == other for one, other in zip(left, right, strict=True)), bool, len(left))


def as_json(texts: Sequence[str]) -> bytes:
    """Return the JSON list of these texts, in ASCII and without blanks."""
    if isinstance(texts, Texts) and texts.is_plain and len(texts):
        return b'["' + texts.joined()[:-1].replace(b"\0", b'","') + b'"]'
    return json.dumps(list(texts), separators=(",", ":")).encode()


def runs(texts: Sequence[str]) -> tuple[np.ndarray | None, Sequence[str]]:
    """Return, of texts that repeat side by side, the number of each one's run and the text of each run.

    None and the texts themselves where no repetition is known.
    """
    if isinstance(texts, Texts):
        begins = texts.begins()
    else:
        begins = np.array([True, *(before != text for before, text in pairwise(texts))])
    if begins.all():
        return None, texts
    return np.cumsum(begins) - 1, taken(texts, np.flatnonzero(begins))


def encoded(texts: Sequence[str]) -> Iterator[bytes]:
    """Yield the UTF-8 of each text."""
    if not isinstance(texts, Texts):
        return map(_encoded, texts)
    return chain.from_iterable(texts[start : start + CHUNK].encoded() for start in range(0, len(texts), CHUNK))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def taken(column: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """Return these rows of a column of texts, in this order."""
    return column.take(rows) if isinstance(column, Texts) else [column[row] for row in rows.tolist()]
