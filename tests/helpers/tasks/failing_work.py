"""Small work of every kind that writes, to be failed at each of its storage operations.

Prints a line of JSON with the counts of each action: python -m tests.helpers.tasks.failing_work WORK FOLDER EVERY
[ACTION...]; EVERY 1 fails every operation, 10 one in ten.
The clock is stopped in it and no rates are written, so that nothing is left out of the comparison of bytes.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import safetensors.numpy  # noqa: F401  imported before the forks, for speed
import torch
import zarr.codecs
import zarr.storage  # noqa: F401

from functa.flows.config.load import load_config
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import is_checkpoint, load_checkpoint
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from functa.tasks.encoding import encode as encoding
from functa.tasks.encoding.plan import EncodeJob
from functa.tasks.training import loop
from tests.helpers.storage import failpoints
from tests.helpers.storage.failpoints import ACTIONS, done, fail_everywhere
from tests.helpers.storage.functasets import fill, filled, plan, write
from tests.helpers.tasks.encoding import encode, trained_field, write_noise
from tests.helpers.tasks.latent_training import run_training, training_job

SETTINGS = [
    "images.source=folder", "images.channels=1", "field.width=8", "field.depth=2", "field.spatial=2",
    "field.channels=4", "inner.compile=off", "meta_train.steps=1", "meta_train.warmup=0", "meta_train.batch=2",
    "meta_train.validation_images=1", "encode.batch=4", "encode.shard_rows=4", "encode.chunk_rows=4",
    "encode.group_shards=4", "encode.calibration_images=4", "encode.quantization.max_clip_fraction=1.0",
]  # fmt: skip

LONG_AGO = 1_000_000_000  # of the images: their times are part of the rows' tokens


def still() -> None:
    """Stop the clocks whose times are stored, and let every step be saved."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, time=lambda: 0.0)
    encoding.time = loop.time = clock  # type: ignore[assignment,attr-defined]
    row = loop._row
    rates = {"images_per_s", "flops_per_s", "utilization"}
    loop._row = lambda *of: {key: value for key, value in row(*of).items() if key not in rates}
    loop._Pace.since_save = lambda self: float("inf")  # type: ignore[method-assign]
    torch.set_num_threads(1)


def pictures(folder: Path, count: int, changed: bool) -> Path:
    """Write a few images of two classes in two splits; `changed` ones have another first image."""
    for split, number in (("train", count), ("test", 2)):
        for i in range(number):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            other = changed and i == 0 and split == "train"
            write_noise(path, i + 100 * other)
            os.utime(path, (LONG_AGO + other,) * 2)
    return folder


def job_of(images: Path, field: Path, store: Path) -> EncodeJob:
    config = load_config("digits", [*SETTINGS, f"images.location={images}"])
    return EncodeJob(
        images=config.images, encode=config.encode, field=str(field), field_digest="feed", functaset=str(store),
        device="cpu",
    )  # fmt: skip


def field_in(folder: Path, images: Path) -> None:
    trained_field(folder, f"images.location={images}", base=SETTINGS)


def encode_still(job: EncodeJob) -> None:
    still()
    encode(job)


def rows_shown(store: Path) -> int:
    """Return how many rows a reader sees, each checked; 0 before the first commit."""
    location = open_location(str(store))
    if not location.exists("zarr.json") or latest(location) is None:
        return 0
    assert verify(location, deep=True).bad == []
    functaset = Functaset.open(location)
    return sum(len(functaset.load(split)) for split in functaset.splits if functaset.rows(split))


def check_rows(*numbers: int) -> Callable[[Path], None]:
    """Return a check that readers see all rows of a version, or of the one before it."""

    def check(path: Path) -> None:
        assert rows_shown(path) in numbers, f"{rows_shown(path)} rows are shown"

    return check


def encoding_work(folder: Path, again: bool) -> failpoints.Work:
    """Return the encoding of 8 images; `again`: of 3 more and a changed one, beside those 8."""
    few, more, field = pictures(folder / "few", 6, False), pictures(folder / "more", 9, True), folder / "field"
    done(partial(field_in, field, few))
    if not again:
        return failpoints.Work(lambda path: encode_still(job_of(few, field, path)), check_rows(0, 8))
    done(lambda: encode_still(job_of(few, field, folder / "before")))
    return failpoints.Work(lambda path: encode_still(job_of(more, field, path)), check_rows(8, 11), folder / "before")


def fill_store(folder: Path) -> None:
    filled(str(folder))


def training_work(folder: Path) -> failpoints.Work:
    """Return a training of 3 steps with a checkpoint at each."""
    done(partial(fill_store, folder / "z"))
    more = ("steps=3", "log_every=1", "evaluate_every=1", "compile=off")

    def check(path: Path) -> None:
        found = load_checkpoint(open_location(str(path)))
        assert found is None or found.metadata["finished"] == (found.step == 3)

    def train(path: Path) -> None:
        still()
        run_training(training_job("classifier", str(folder / "z"), path, *more))

    return failpoints.Work(train, check, may_be_left=is_checkpoint)


def upkeep_work(folder: Path, erase: bool) -> failpoints.Work:
    """Return a collection of two expired versions and an abandoned fragment, or the erasure of retired rows."""

    def prepare() -> None:
        place = filled(folder / "before")
        fill(place, [plan(place, n=5, first=20)])
        abandoned = plan(place, n=9, first=100)
        write(place, abandoned, 0)
        place.create(f"{abandoned.path}/claim", b"commit")
        retire(place, "train", ["train/00002", "train/00013"])
        commit(place, [], again=True)

    def gc(path: Path) -> None:
        later = time.time() + 200_000
        keep = None if erase else 1
        collect(open_location(str(path)), delete=True, erase_retired=erase, keep_versions=keep, now=lambda: later)

    done(prepare)
    # A collection that is done again commits once more: the numbers of the commits are not compared.
    return failpoints.Work(gc, check_rows(29), folder / "before", apart=is_numbered, meaning=newest_commit)


def is_numbered(key: str) -> bool:
    return key.startswith(("commits/", "versions/"))


def newest_commit(store: Path) -> object:
    """Return what the newest commit shows, without its number, that of the oldest one and the parent's digest."""
    found = json.loads(max((store / "commits").glob("*.json")).read_text())
    return {key: value for key, value in found.items() if key not in ("version", "oldest", "parent", "checksum")}


WORK: dict[str, Callable[[Path], failpoints.Work]] = {
    "encode": lambda folder: encoding_work(folder, again=False),
    "re-encode": lambda folder: encoding_work(folder, again=True),
    "train": training_work,
    "gc": lambda folder: upkeep_work(folder, erase=False),
    "erase": lambda folder: upkeep_work(folder, erase=True),
}


def main(name: str, folder: Path, every: int, actions: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = WORK[name](folder)
    for action in actions:
        begun = time.monotonic()
        counts = fail_everywhere(work, folder, action, every)
        print(json.dumps({"work": name, **counts, "seconds": round(time.monotonic() - begun, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or [*ACTIONS])
