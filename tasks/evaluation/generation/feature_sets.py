"""Features of a set as .npz files: moments that merge by addition, a few rows, and counts."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from functa.models.measures.metrics import FrechetStatistics
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location


@dataclass
class Space:
    """Features of one set in one space: float64 moments of all rows, or none, and some of the rows themselves."""

    dimensions: int
    moments: FrechetStatistics | None  # None where no Frechet distance can be taken
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)  # float32 [n, D] each

    def add(self, features: Tensor, keep: np.ndarray) -> None:
        """Add the features [B, D] of one batch; `keep` bool [B]: the rows that are kept as they are."""
        self.count += len(features)
        self.kept.append(features[torch.from_numpy(keep)].float())
        if self.moments is not None:
            self.moments.update(features)

    def rows(self, most: int) -> Tensor:
        """Return at most `most` of the kept rows, spread over them: [n, D]."""
        kept = torch.cat(self.kept)
        if len(kept) <= most:
            return kept
        return kept[torch.from_numpy(np.linspace(0, len(kept) - 1, most).round().astype(np.int64))]


@dataclass
class Gathered:
    """One set, or one slice of it: its features by space, its pictures' shape [H, W, ch], and what was counted."""

    kind: str
    spaces: dict[str, Space] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    agreeing: int = 0  # samples that the pixel classifier takes for their label
    pictures: list[np.ndarray] = field(default_factory=list)  # uint8 [n, 32]: sha256 of each picture's bytes
    weights: str = ""  # sha256 of Inception's weights

    @property
    def duplicates(self) -> int:
        """Count the pictures that repeat another one byte for byte."""
        digests = np.concatenate(self.pictures) if self.pictures else np.empty((0, 32), np.uint8)
        return len(digests) - len(np.unique(digests, axis=0))

    def merge(self, other: "Gathered") -> None:
        """Add another slice of the same set. Raises StorageError if it is of other pictures, spaces or weights."""
        for what, ours, theirs in (
            ("picture shape", self.shape, other.shape), ("spaces", sorted(self.spaces), sorted(other.spaces)),
            ("Inception weights", self.weights[:16], other.weights[:16]),
            ("dimensions", *({k: v.dimensions for k, v in part.spaces.items()} for part in (self, other))),
        ):  # fmt: skip
            if ours != theirs:
                raise StorageError(
                    f"features of {self.kind}: a slice of {what} {theirs} beside one of {ours}; evaluate into a new "
                    "--root, or delete the run's features/ folder"
                )
        self.agreeing += other.agreeing
        self.pictures += other.pictures
        for name, space in other.spaces.items():
            own = self.spaces[name]
            own.count, own.kept = own.count + space.count, own.kept + space.kept
            if own.moments is not None and space.moments is not None:
                own.moments.merge(space.moments)


def to_bytes(gathered: Gathered) -> bytes:
    """Return an .npz file: for each space count, sum x, the upper triangle of sum x x^T (float64), the kept rows."""
    arrays = {
        "kind": np.array(gathered.kind), "shape": np.array(gathered.shape, np.int64),
        "agreeing": np.array(gathered.agreeing), "weights": np.array(gathered.weights),
        "spaces": np.array(list(gathered.spaces), np.str_),
        "pictures": np.concatenate([np.empty((0, 32), np.uint8), *gathered.pictures]),
    }  # fmt: skip
    for name, space in gathered.spaces.items():
        arrays[f"{name}_count"] = np.array(space.count)
        arrays[f"{name}_kept"] = torch.cat([torch.empty(0, space.dimensions), *space.kept]).numpy()
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
        count, kept = int(arrays[f"{name}_count"]), torch.from_numpy(arrays[f"{name}_kept"])
        moments = None
        if f"{name}_total" in arrays:
            sums = (torch.from_numpy(arrays[f"{name}_{sum_}"]) for sum_ in ("total", "outer"))
            moments = FrechetStatistics.of_sums(count, *sums)
        spaces[name] = Space(kept.shape[1], moments, count, [kept])
    return Gathered(
        kind=str(arrays["kind"]), spaces=spaces, shape=tuple(int(side) for side in arrays["shape"]),
        agreeing=int(arrays["agreeing"]), pictures=[arrays["pictures"]], weights=str(arrays["weights"]),
    )  # fmt: skip


def merged(uris: Sequence[str]) -> dict[str, Gathered]:
    """Merge the files of all slices, by set: moments are added, exact up to the order of float64 sums."""
    sets: dict[str, Gathered] = {}
    for uri in uris:
        folder, _, key = uri.rpartition("/")
        part = from_bytes(open_location(folder).read(key))
        if part.kind not in sets:
            sets[part.kind] = part
        elif part.spaces:  # an empty slice has seen none
            sets[part.kind].merge(part)
    return sets
