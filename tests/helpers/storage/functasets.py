"""A small functaset, filled as the encoding tasks do."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from functa.storage.config import QuantizationConfig
from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.plan import Plan, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import calibrate
from functa.storage.functaset.receipts.receipt import Receipt
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from tests.helpers.storage.locations import Home

SHAPE = (2, 2, 8)
FINGERPRINT = {"field": "f0", "inner": {"steps": 3, "loss": "patch"}, "bits": 8}
FIELD = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}


def latents_of(keys: list[str], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Return latents [n, s, s, c] that are a function of the key: heavy-tailed, like functa."""
    seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys]
    return np.stack([np.random.default_rng(seed).laplace(0, 0.05, shape) for seed in seeds]).astype(np.float32)


def new_store(path: Home | str, fingerprint: dict[str, Any] | None = None) -> Location:
    location = open_location(str(path))
    create_functaset(location, fingerprint or FINGERPRINT, FIELD, {"width": 3}, "f0")
    return location


def plan(location: Location, split: str = "train", n: int = 20, first: int = 0, bits: int = 8, **changes: Any) -> Plan:
    keys = [f"{split}/{i:05d}" for i in range(first, first + n)]
    codec = changes.pop("codec", "zstd")
    ranges = changes.pop("range", "minmax")
    wide = np.concatenate(
        [latents_of([f"wide/{i}" for i in range(256)]), np.full((1, *SHAPE), 1), np.full((1, *SHAPE), -1)]
    )
    quantizer = calibrate(QuantizationConfig(bits=bits, range=ranges), wide)
    arguments: dict[str, Any] = {"latent_shape": SHAPE, "shard_rows": 8, "chunk_rows": 4, "quantizer": quantizer}
    arguments |= {"codec": codec} | changes
    labels = np.arange(first, first + n, dtype=np.int32) % 10
    return plan_fragment(location, RowTable.of(keys, labels, [f"t-{k}" for k in keys]), split=split, **arguments).plan


def shard_of(location: Location, plan: Plan, number: int) -> Shard:
    return Shard(Fragment(location, plan), number)


def table_of(location: Location, plan: Plan, number: int) -> RowTable:
    return shard_of(location, plan, number).table()


def write(location: Location, plan: Plan, shard: int, bad: dict[int, str] | None = None, **changes: Any) -> Receipt:
    """Write the shard's rows and return its receipt; `bad` maps a row to the reason."""
    planned = shard_of(location, plan, shard)
    rows = planned.table()
    n = len(rows.keys)
    good = np.ones(n, bool)
    good[list(bad or {})] = False
    arguments: dict[str, Any] = {
        "latents": latents_of(rows.keys, plan.latent_shape),
        "psnr": np.linspace(25, 35, n).astype(np.float32),
        "sha256": np.stack([np.frombuffer(hashlib.sha256(k.encode()).digest(), np.uint8) for k in rows.keys]),
        "good": good,
        "reasons": bad or {},
    }
    return write_shard(planned, **arguments | changes)


def fill(location: Location, plans: list[Plan]) -> None:
    for each in plans:
        for shard in range(each.shards):
            write(location, each, shard)
    commit(location, [each.id for each in plans])


def filled(path: Home | str, bits: int = 8) -> Location:
    """Write and commit a functaset: train 20 rows in 3 shards, test 6 rows in 1."""
    location = new_store(path)
    fill(location, [plan(location, bits=bits), plan(location, "test", n=6, bits=bits)])
    return location


def tree(path: Home | str) -> dict[str, str]:
    """Return the sha256 of every object, temporary ones left out."""
    if str(path).startswith("s3://"):
        location = open_location(str(path))
        return {key: hashlib.sha256(location.read(key)).hexdigest() for key in location.list()}
    files = sorted(p for p in Path(path).rglob("*") if p.is_file() and not p.name.endswith(".partial"))
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def store_with_bad_rows(folder: Path, bits: int = 8) -> Functaset:
    """Write fragments of 20 and 13 rows, with different ranges if coded; 4 rows are bad, among them a whole shard."""
    place = new_store(folder, {"bits": bits})
    first = plan(place, n=20, bits=bits)
    second = plan(place, n=13, first=20, bits=bits, range="sigma", shard_rows=4)
    for shard in range(first.shards):
        write(place, first, shard, bad={1: "a", 6: "b"} if shard == 1 else None, max_clip_fraction=1.0)
    for shard in range(second.shards):
        bad = {row: "c" for row in range(second.shard_size(shard))} if shard == second.shards - 1 else None
        write(place, second, shard, bad=bad, max_clip_fraction=1.0)
    commit(place, [first.id, second.id])
    return Functaset.open(place)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        return path.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
    return path.write_bytes(data[: len(data) // 2] if how == "short" else data)  # type: ignore[return-value]


def flip_in(location: Location, key: str) -> None:
    """Flip a bit in the middle of an object."""
    data = bytearray(location.read(key))
    data[len(data) // 2] ^= 1
    location.write(key, bytes(data))
