"""Compare the functaset's readers and writer with numpy, np.memmap and webdataset, in turns; prints one JSON line.

    python benchmarks/store.py                                   # 50,000 latents of 8x8x16, about 4 minutes on 2 cores
    python benchmarks/store.py --rows 2000 --memory-rows 1000,2000 --seconds 0.05 --alternations 1

Shuffled batches, labels with them. Ratios are taken turn by turn, against a peer that gathers the same rows; the
dequantised ones are compared with numpy's gather of float32 rows from memory. Each peak of memory is of a separate
process. Without webdataset (make bench-install) streaming has no peer.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

from benchmarks.side import turn
from functa.storage.config import QuantizationConfig
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.header import create_functaset
from functa.storage.functaset.plan import RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import calibrate
from functa.storage.functaset.shards.shard import Shard
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.readers.hydrate import hydrate
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Reader

SHAPE = (8, 8, 16)  # CIFAR-10's (Table 4)
Call = Callable[[], Any]


def latents(rows: int, seed: int = 0) -> np.ndarray:
    """Draw latents float32 [n, 8, 8, 16], about as spread as real ones."""
    return np.random.default_rng(seed).normal(0, 0.05, (rows, *SHAPE)).astype(np.float32)


class Store:
    """A functaset of the training split alone, written shard by shard."""

    def __init__(self, folder: Path, z: np.ndarray, bits: int, options: argparse.Namespace) -> None:
        self.location: Location = open_location(str(folder))
        create_functaset(self.location, {"bits": bits}, {"w": np.zeros(1, np.float32)}, {}, "f0")
        keys = [f"{i:08d}" for i in range(len(z))]
        self.z = z
        self.fragment = plan_fragment(
            self.location, RowTable.of(keys, np.arange(len(z)) % 10, keys), split="train", latent_shape=SHAPE,
            shard_rows=options.shard_rows, chunk_rows=min(256, options.shard_rows),
            quantizer=calibrate(QuantizationConfig(bits=bits), z[:4096]),
        )  # fmt: skip

    def write(self, shard: Shard) -> None:
        count = shard.size
        write_shard(
            shard, latents=self.z[shard.first : shard.first + count], psnr=np.full(count, 36, np.float32),
            sha256=np.zeros((count, 32), np.uint8), max_clip_fraction=1.0,
        )  # fmt: skip

    def committed(self) -> Functaset:
        for shard in self.fragment.shards:
            self.write(shard)
        commit(self.location, [self.fragment.id])
        return Functaset.open(self.location)


def forever(epoch: Callable[[int], Iterator[Any]]) -> Call:
    """Return a function that returns the next batch, epoch after epoch."""

    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield from epoch(number)
            number += 1

    batches = endless()
    return lambda: next(batches)


def ours(reader: Reader, batch: int, dequantize: bool = False) -> Call:
    """Return the next batch of a reader at each call, dequantised into one buffer if requested."""
    order = Order(batch, drop_last=True)
    step = forever(lambda epoch: reader.batches(order, epoch, reuse=True))
    if not dequantize:
        return step
    out = np.empty((batch, *SHAPE), np.float32)
    return lambda: reader.dequantized(step(), out)


def gathered(z: np.ndarray, labels: np.ndarray, batch: int) -> Call:
    """Gather with numpy, z[rows] and labels[rows], in the order of a permutation."""

    def epoch(number: int) -> Iterator[Any]:
        order = np.random.default_rng(number).permutation(len(z))
        for start in range(0, len(z) - batch + 1, batch):
            rows = order[start : start + batch]
            yield z[rows], labels[rows]

    return forever(epoch)


def webdataset(folder: Path, z: np.ndarray, batch: int) -> Call | None:
    """Read a tar of .npy members as webdataset's documentation shows: shuffled in a buffer, decoded, batched."""
    try:
        import webdataset as wds
    except ImportError:
        return None
    names = []
    for first in range(0, len(z), 8192):
        names.append(str(folder / f"{first:08d}.tar"))
        with tarfile.open(names[-1], "w") as tar:
            for row in range(first, min(first + 8192, len(z))):
                for ending, value in (("npy", z[row]), ("label.npy", np.int32(row % 10))):
                    data = io.BytesIO()
                    np.save(data, value)
                    member = tarfile.TarInfo(f"{row:08d}.{ending}")
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
    dataset = wds.WebDataset(names, shardshuffle=len(names)).shuffle(2048).decode().to_tuple("npy", "label.npy")
    return forever(lambda _: iter(dataset.batched(batch, partial=False)))


def compare(
    piece: str,
    call: Call,
    peer: str | None,
    peer_call: Call | None,
    options: argparse.Namespace,
    row_bytes: int,
    rows: int | None = None,
) -> dict[str, Any]:
    """Return a row: medians over the turns, ratios turn by turn. Our call reads `rows`, or a batch like the peer's."""
    dealt = {"ours": rows or options.batch, "peer": options.batch}
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for work in (call, peer_call):
        if work:
            work()
    for _ in range(options.alternations):
        for side, work in (("ours", call), ("peer", peer_call)):
            if work:
                measured = turn(work, options.seconds)
                rates[side].append(dealt[side] * measured["calls"] / measured["elapsed"])
    ratios = [a / b for a, b in zip(rates["ours"], rates["peer"])]
    row = {
        "name": "store", "piece": piece, "config": configuration(options), "rows_per_s": round(median(rates["ours"])),
        "mb_per_s": round(median(rates["ours"]) * row_bytes / 1e6, 1), "alternations": options.alternations,
    }  # fmt: skip
    if peer and ratios:
        row |= {"peer": peer, "peer_rows_per_s": round(median(rates["peer"]))}
        row |= {"ratio": round(median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios]}
    return row


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that all rows share."""
    return {"rows": options.rows, "batch": options.batch, "shape": list(SHAPE), "shard_rows": options.shard_rows}


def write_rates(folder: Path, z: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Time write_shard of float32, and one write and fsync of the same bytes, shard by shard in turns."""
    store = Store(folder, z, 32, options)
    rates: list[float] = []
    plain: list[float] = []
    for shard in store.fragment.shards:
        part = z[shard.first : shard.first + shard.size]
        begun = time.perf_counter()
        store.write(shard)
        rates.append(part.nbytes / (time.perf_counter() - begun) / 1e6)
        begun = time.perf_counter()
        with open(folder / "plain", "wb") as file:
            file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        plain.append(part.nbytes / (time.perf_counter() - begun) / 1e6)
        (folder / "plain").unlink()
    commit(store.location, [store.fragment.id])
    return {
        "name": "store", "piece": "write float32", "config": configuration(options),
        "mb_per_s": round(median(rates), 1), "shards": store.fragment.plan.shards,
        "peer": "write and fsync", "peer_mb_per_s": round(median(plain), 1),
        "ratio": round(median(a / b for a, b in zip(rates, plain)), 2),
    }  # fmt: skip


def peaks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory of a process that streams one epoch, by rows; buffers of 4 shards of 1024 rows."""
    small = argparse.Namespace(**vars(options) | {"shard_rows": min(1024, options.shard_rows)})
    peak = {}
    for count in map(int, options.memory_rows.split(",")):
        place = folder / str(count)
        Store(place, latents(count), 32, small).committed()
        child = subprocess.run(
            [sys.executable, __file__, "--stream", str(place), "--batch", str(options.batch)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        peak[str(count)] = float(child.stdout)
    row = {"name": "store", "piece": "memory of streaming", "config": configuration(small), "peak_mb": peak}
    return row | {"ratio": round(max(peak.values()) / min(peak.values()), 3)}


def stream(place: str, batch: int) -> float:
    """Stream one epoch; return the peak memory of this process in MB."""
    reader = open_reader(Functaset.open(place), "train", "streamed", buffer_shards=4)
    rows = sum(len(labels) for labels in (each.labels for each in reader.batches(Order(batch))))
    assert rows == len(reader)
    # VmHWM counts this program only: ru_maxrss includes the process before exec.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) / 1024, 1)


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    rows = [peaks(folder, options)]
    z, labels = latents(options.rows), np.arange(options.rows, dtype=np.int32) % 10
    rows.append(write_rates(folder / "float32", z, options))
    floats = Functaset.open(str(folder / "float32"))
    coded = Store(folder / "codes", z, 8, options).committed()
    hydrate(coded, str(folder / "raw"))
    wide = z[0].nbytes
    in_memory = open_reader(coded, "train", "memory")
    codes = in_memory.z  # type: ignore[attr-defined]

    def against(piece: str, reader: Reader, peer: str, array: np.ndarray, dequantize: bool = False) -> None:
        call, beside = ours(reader, options.batch, dequantize), gathered(array, labels, options.batch)
        row_bytes = wide if dequantize else reader.dtype.itemsize * wide // 4
        rows.append(compare(piece, call, peer, beside, options, row_bytes))

    against("memory, codes", in_memory, "numpy", codes)
    against("memory, float32", open_reader(floats, "train", "memory"), "numpy", z)
    np.save(folder / "codes.npy", codes)
    np.save(folder / "z.npy", z)
    mapped_codes = open_reader(coded, "train", "mapped", hydrated=str(folder / "raw"))
    against("mapped, codes, hydrated", mapped_codes, "np.memmap", np.load(folder / "codes.npy", mmap_mode="r"))
    mapped = open_reader(floats, "train", "mapped", hydrated=str(folder / "raw"))
    against("mapped, float32, in place", mapped, "np.memmap", np.load(folder / "z.npy", mmap_mode="r"))
    against("memory, codes dequantised", in_memory, "numpy, float32", z, dequantize=True)
    against("mapped, codes dequantised", mapped_codes, "numpy, float32", z, dequantize=True)
    streamed = open_reader(floats, "train", "streamed", buffer_shards=options.buffer_shards)
    peer = webdataset(folder, z, options.batch)
    order = Order(options.batch)

    def epoch() -> None:  # a whole one, from nothing: its thread must not have read ahead in the peer's turn
        assert sum(len(batch) for batch in streamed.batches(order, reuse=True)) == options.rows

    rows.append(compare("streamed, float32", epoch, "webdataset", peer, options, wide, options.rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--shard-rows", type=int, default=8192)
    parser.add_argument("--buffer-shards", type=int, default=2)
    parser.add_argument("--memory-rows", default="25000,100000", help="rows of the streams whose memory is measured")
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(stream(options.stream, options.batch))
        return
    if options.alternations < 1 or options.batch < 1 or options.rows < options.batch:
        parser.error("--alternations and --batch are 1 at least, --rows a batch at least")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options)))


if __name__ == "__main__":
    main()
