"""Features of a set as .npz files: moments that merge by addition, a few rows, and counts."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functa.models.measures.metrics import FrechetStatistics
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location


@dataclass
class Space:
    """Features of one set in one space: float64 moments of all rows, or none, and some of the rows themselves."""

    dimensions: int  # of a covariance
    moments: FrechetStatistics | None  # None where no Frechet distance can be taken
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)  # float32 [n, D] each, with groups [n, P D]
    labels: list[np.ndarray] = field(default_factory=list)  # int64 [n] of the kept rows, -1 where they have none
    protocol: dict[str, Any] = field(default_factory=dict)

    def add(self, count: int, features: Tensor, keep: np.ndarray, labels: np.ndarray) -> None:
        """Add `count` rows, of which B are needed: features [B, D] or [B, P, D], labels int64 [B].

        keep bool [B]: which of them are kept as they are.
        """
        self.count += count
        if keep.any():
            self.kept.append(features[torch.from_numpy(keep)].float().flatten(1))
            self.labels.append(labels[keep])
        if self.moments is not None and len(features):
            self.moments.update(features)

    @property
    def kept_rows(self) -> int:
        """Count the rows that are kept."""
        return sum(map(len, self.kept))

    def rows(self, most: int) -> tuple[Tensor, np.ndarray]:
        """Return at most `most` of the kept rows, spread over them, and their labels: [n, D], int64 [n]."""
        if not self.kept:
            return torch.empty(0, 0), np.empty(0, np.int64)
        kept, labels = torch.cat(self.kept), np.concatenate(self.labels)
        if len(kept) <= most:
            return kept, labels
        chosen = np.linspace(0, len(kept) - 1, most).round().astype(np.int64)
        return kept[torch.from_numpy(chosen)], labels[chosen]

    def merge(self, other: "Space") -> None:
        """Add the features of another slice."""
        self.count, self.kept, self.labels = (
            self.count + other.count, self.kept + other.kept, self.labels + other.labels
        )  # fmt: skip
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)


@dataclass
class Gathered:
    """One set, or one slice of it: its features by space, its pictures' shape [H, W, ch] and digests."""

    kind: str
    spaces: dict[str, Space] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    pictures: list[np.ndarray] = field(default_factory=list)  # uint8 [n, 32]: sha256 of each picture's bytes

    @property
    def duplicates(self) -> int:
        """Count the pictures that repeat another one byte for byte."""
        digests = np.concatenate(self.pictures) if self.pictures else np.empty((0, 32), np.uint8)
        return len(digests) - len(np.unique(digests, axis=0))

    def merge(self, other: "Gathered") -> None:
        """Add another slice of the same set. Raises StorageError if it is of other pictures, spaces or weights."""
        parts = (self, other)
        for what, ours, theirs in (
            ("picture shape", self.shape, other.shape), ("spaces", sorted(self.spaces), sorted(other.spaces)),
            ("dimensions", *({k: v.dimensions for k, v in part.spaces.items()} for part in parts)),
            ("protocol", *({k: v.protocol for k, v in part.spaces.items()} for part in parts)),
        ):  # fmt: skip
            if ours != theirs:
                raise StorageError(
                    f"features of {self.kind}: a slice of {what} {theirs} beside one of {ours}; evaluate into a new "
                    "--root, or delete the run's features/ folder"
                )
        self.pictures += other.pictures
        for name, space in other.spaces.items():
            self.spaces[name].merge(space)


def to_bytes(gathered: Gathered) -> bytes:
    """Return an .npz file: for each space count, sum x, the upper triangle of sum x x^T (float64), the kept rows."""
    arrays = {
        "kind": np.array(gathered.kind), "shape": np.array(gathered.shape, np.int64),
        "spaces": np.array(list(gathered.spaces), np.str_),
        "pictures": np.concatenate([np.empty((0, 32), np.uint8), *gathered.pictures]),
    }  # fmt: skip
    for name, space in gathered.spaces.items():
        arrays[f"{name}_count"] = np.array(space.count)
        arrays[f"{name}_dimensions"] = np.array(space.dimensions)
        arrays[f"{name}_protocol"] = np.array(json.dumps(space.protocol, sort_keys=True))
        arrays[f"{name}_kept"] = (torch.cat(space.kept) if space.kept else torch.empty(0, 0)).numpy()
        arrays[f"{name}_labels"] = np.concatenate([np.empty(0, np.int64), *space.labels])
        if space.moments is not None and space.moments.total is not None:
            arrays[f"{name}_total"] = space.moments.total.cpu().numpy()
            arrays[f"{name}_outer"] = space.moments.triangle.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy: any name but allow_pickle is an array's
    return buffer.getvalue()


def from_bytes(data: bytes) -> Gathered:
    """Read the .npz file that to_bytes wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    spaces = {}
    for name in (str(name) for name in arrays["spaces"]):
        count, moments = int(arrays[f"{name}_count"]), None
        kept, labels = torch.from_numpy(arrays[f"{name}_kept"]), arrays[f"{name}_labels"]
        if f"{name}_total" in arrays:
            sums = (torch.from_numpy(arrays[f"{name}_{sum_}"]) for sum_ in ("total", "outer"))
            moments = FrechetStatistics.of_sums(count, *sums)
        spaces[name] = Space(
            int(arrays[f"{name}_dimensions"]), moments, count, [kept] if len(kept) else [],
            [labels] if len(kept) else [], json.loads(str(arrays[f"{name}_protocol"])),
        )  # fmt: skip
    return Gathered(
        kind=str(arrays["kind"]), spaces=spaces, shape=tuple(int(side) for side in arrays["shape"]),
        pictures=[arrays["pictures"]],
    )  # fmt: skip


def merged(uris: Sequence[str]) -> dict[str, Gathered]:
    """Merge the files of all slices, by set: moments are added, exact up to the order of float64 sums."""
    sets: dict[str, Gathered] = {}
    for uri in uris:
        folder, _, key = uri.rpartition("/")
        try:
            part = from_bytes(open_location(folder).read(key))
        except KeyError:
            raise StorageError(f"{uri}: written by an earlier version; delete {folder} and evaluate again") from None
        if part.kind not in sets:
            sets[part.kind] = part
        elif part.spaces:  # an empty slice has seen none
            sets[part.kind].merge(part)
    return sets
