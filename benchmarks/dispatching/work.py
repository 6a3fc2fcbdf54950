"""The work that is dispatched: an encoding that is planned, with groups of a wanted duration; and its options."""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.dispatching.bare import side_by_side
from benchmarks.dispatching.rates import Groups, Stats, lanes, steady_rate

if TYPE_CHECKING:
    from functa.tasks.encoding.plan import EncodeJob

QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "WARNING"}

SHARDS = 4  # in a group


class Work:
    """A functaset that is planned but not encoded, and copies of it to encode."""

    def __init__(self, folder: Path, options: argparse.Namespace, shard_rows: int, groups: int, shards: int) -> None:
        from functa.flows.config.load import load_config
        from functa.tasks.encoding.plan import EncodeJob, plan

        self.folder, self.mode = folder, ""
        images = folder / "images"
        _draw(images, options, shard_rows * shards * groups)
        size = {"shard_rows": shard_rows, "chunk_rows": max(1, shard_rows // 4), "group_shards": shards}
        sets = [f"encode.{name}={value}" for name, value in size.items()]
        sets += [*options.set, "images.source=npz", f"images.location={images}", "encode.quantization.bits=32"]
        config = load_config(options.preset, [f"inner.compile={'off' if options.eager else 'on'}", *sets])
        _field(folder / "field", config)
        self.job = EncodeJob(
            images=config.images, encode=config.encode, field=str(folder / "field"), field_digest="d",
            functaset=str(folder / "planned"), device="cpu",
        )  # fmt: skip
        planned = plan(self.job)
        self.groups = [group for group in planned.groups if group.split == "train"]

    @contextmanager
    def copy(self) -> Iterator[tuple["EncodeJob", Path]]:
        """Return a job on a copy of the functaset, of which nothing is encoded yet."""
        store = self.folder / "copy"
        shutil.copytree(self.folder / "planned", store)
        yield self.job.model_copy(update={"functaset": str(store)}), store
        shutil.rmtree(store)


def _draw(folder: Path, options: argparse.Namespace, count: int) -> None:
    """Write train.npz of `count` images, those of --images repeated or noise, and a small test.npz."""
    if options.images:
        from functa.storage.images.arrays import read_npz

        source = read_npz(options.images)["train"].images
    else:
        source = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)
    folder.mkdir()
    for split, number in (("train", count), ("test", 2)):
        rows = np.arange(number) % len(source)
        np.savez(folder / f"{split}.npz", images=source[rows], labels=(rows % 2).astype(np.int64))


def _field(folder: Path, config: Any) -> None:
    """Train a field for one step: its speed of encoding does not depend on its training."""
    from functa.tasks.training import meta_train
    from functa.tasks.training_jobs import MetaTrainJob

    once = {"steps": 1, "warmup": 0, "batch": 1, "validation_images": 0, "patches_per_image": None}
    sections = {"images": config.images, "field": config.field, "inner": config.inner}
    training = config.meta_train.model_copy(update=once)
    job = MetaTrainJob(
        seed=0, device="cpu", output=str(folder), digest="d", meta_train=training, **sections
    )  # fmt: skip
    meta_train.run(job, emit=lambda _: None)


def planned_work(folder: Path, options: argparse.Namespace, workers: int) -> Work:
    """Return groups of the wanted duration, by the rate of as many bare processes, which is measured first."""
    (folder / "calibration").mkdir()
    probe = Work(folder / "calibration", options, shard_rows=4 * options.batch, groups=workers, shards=SHARDS)
    with probe.copy() as (job, store):  # fills the compiler's cache too
        stats = side_by_side(job, probe.groups, workers)
        found = lanes(stats, probe.groups, store)
    rate = steady_rate(found) / workers
    shard_rows = max(1, round(1.1 * rate * options.seconds / SHARDS / options.batch)) * options.batch
    (folder / "measured").mkdir()
    work = Work(folder / "measured", options, shard_rows, options.groups, SHARDS)
    work.mode = stats[0]["mode"]
    return work


def through_prefect(job: "EncodeJob", groups: Groups, runner: str, workers: int) -> tuple[Stats, float]:
    """Encode with the `encode` flow's own map over groups, within a flow; return its results and total seconds."""
    from prefect import flow

    from functa.flows.stages import encode_groups
    from functa.tasks.config import DispatchConfig
    from functa.tasks.encoding.plan import Planned

    @flow(persist_result=False)
    def encode() -> tuple[Stats, float]:
        begun = time.monotonic()
        planned = Planned(groups=tuple(groups), fragments=tuple(sorted({group.fragment for group in groups})))
        stats = encode_groups(job, planned, DispatchConfig(runner=runner, workers=workers))
        return stats, time.monotonic() - begun

    os.environ["OMP_NUM_THREADS"] = str(workers)  # which Dask workers share: one thread for each
    return encode()


@contextmanager
def server() -> Iterator[None]:
    """Start a Prefect server; none of its processes runs while bare processes are measured."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def arrays(store: Path) -> dict[str, bytes]:
    """Return the stored arrays of a functaset."""
    chunks = (path for path in store.glob("fragments/*/*/c/**/*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in chunks}


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the rows of all sides share."""
    named = {name: getattr(options, name) for name in ("preset", "batch", "seconds", "groups", "set")}
    return named | {"shards_per_group": SHARDS, "compiled": not options.eager, "real_images": bool(options.images)}


def parser_of(text: str, groups: int, alternations: int) -> argparse.ArgumentParser:
    """Return the options that all measurements have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of train.npz; none: noise")
    parser.add_argument("--preset", default="cifar10_8x8x16_fast")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the preset")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each group at least")
    parser.add_argument("--groups", type=int, default=groups)
    parser.add_argument("--alternations", type=int, default=alternations)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser


def parsed(parser: argparse.ArgumentParser, workers: Callable[[argparse.Namespace], int]) -> argparse.Namespace:
    """Return the options, checked; Prefect is quiet from now on."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = parser.parse_args()
    if options.groups < workers(options) or options.groups % workers(options) or options.alternations < 1:
        parser.error(f"--groups is a multiple of {workers(options)}, --alternations 1 at least")
    options.set = [*options.set, f"encode.batch={options.batch}"]
    return options


def measured(measure: Callable[[Path, argparse.Namespace], Any], options: argparse.Namespace) -> None:
    """Measure in a temporary folder and print the rows as one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options)))
