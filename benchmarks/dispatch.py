"""Compare encoding through Prefect and Dask with bare processes, and measure a group without work: JSON.

    python benchmarks/dispatch.py --images FOLDER     # has train.npz; groups of a minute, half an hour on 2 cores
    python benchmarks/dispatch.py --seconds 1 --alternations 1 --empty 10,30
    python benchmarks/dispatch.py --pool 3 --groups 12 --seconds 30     # workers of a pool, and nothing else

Encoding: the same groups by two bare processes of one thread side by side, by two Dask workers of one thread on a
Prefect server of their own, and by one, in turns. A rate is that of the time in which every worker was busy, from the
first shard that each had written to the last; the time before is listed separately. All must write the same bytes.
Empty groups: every shard exists; the figure is per group after each worker's first. Pool: as many workers of
`functa up` as bare processes, dispatch.runner=prefect; CPU seconds are of all processes, the server's apart.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

if TYPE_CHECKING:
    from functa.tasks.encoding.plan import EncodeJob, ShardGroup

QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "WARNING"}
Stats = list[dict[str, Any]]

Groups = Sequence["ShardGroup"]
SHARDS = 4  # in a group
SIDES = ("bare", "two workers", "one worker")
WORKERS = 2


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
        source = np.random.default_rng(0).integers(0, 256, (1000, *options.shape), np.uint8)
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


def encode_bare(job: "EncodeJob", groups: Groups, images: int) -> Stats:
    """Encode the groups one after the other, in this process."""
    from functa.tasks.encoding.encode import encode_group

    return [encode_group(job, group, images, run="bare") for group in groups]


def encode_bare_from(text: str) -> Stats:
    """Run encode_bare on a job and groups given as a line of JSON."""
    from functa.tasks.encoding.plan import EncodeJob, ShardGroup

    given = json.loads(text)
    groups = [ShardGroup.model_validate(group) for group in given["groups"]]
    return encode_bare(EncodeJob.model_validate(given["job"]), groups, given["images"])


def side_by_side(job: "EncodeJob", groups: Groups, processes: int) -> Stats:
    """Encode in bare processes of one thread each; every process gets its groups beforehand."""
    images = sum(group.images for group in groups)
    shares = [groups[number::processes] for number in range(processes)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--bare"], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in shares
    ]  # fmt: skip
    for child, share in zip(children, shares):
        assert child.stdin
        described = [group.model_dump(mode="json") for group in share]
        child.stdin.write(json.dumps({"job": job.model_dump(mode="json"), "groups": described, "images": images}))
        child.stdin.close()
    stats: Stats = [{}] * len(groups)
    for number, child in enumerate(children):
        assert child.stdout
        answer = child.stdout.read()
        if child.wait():
            raise SystemExit(f"a bare process ended with status {child.returncode}; its output is above")
        stats[number::processes] = json.loads(answer)
    return stats


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
def pool(root: Path, workers: int) -> Iterator[Callable[[], float]]:
    """Run `functa up` with so many workers of one thread; yield a function that returns the server's CPU seconds."""
    import psutil
    from prefect.context import refresh_global_settings_context

    from functa.flows.server.api import PASSWORD, local_api, password_file

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    code = "from functa.flows.cli.main import main; main()"
    command = [sys.executable, "-c", code, "up", "--port", str(port), "--root", str(root), "--gpus", str(workers)]
    os.environ["PREFECT_HOME"] = str(root.parent / "home")  # a database of its own
    environment = os.environ | {"OMP_NUM_THREADS": str(workers), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    try:
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        else:
            raise SystemExit(f"`functa up` ended: {line}")
        children = psutil.Process(process.pid).children(recursive=True)
        served = next(child for child in children if "guarded" in " ".join(child.cmdline()))
        os.environ |= {"PREFECT_API_URL": local_api(port), PASSWORD: password_file(port).read_text()}
        refresh_global_settings_context()
        yield lambda: float(sum(sum(each.cpu_times()[:2]) for each in [served, *served.children(recursive=True)]))
    finally:
        process.terminate()
        process.wait(120)


@contextmanager
def server() -> Iterator[None]:
    """Start a Prefect server; none of its processes runs while bare processes are measured."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def lanes(stats: Stats, groups: Groups, store: Path) -> list[list[tuple[float, int]]]:
    """Return each worker's (seconds since the epoch, images so far) after every shard, by the receipts' times."""
    found: list[list[tuple[float, int]]] = []
    for each, group in sorted(zip(stats, groups), key=lambda pair: pair[0]["begun"]):
        ends = sorted(
            (store / "fragments" / group.fragment / "receipts" / f"{shard:06d}.0.json").stat().st_mtime
            for shard in group.shards
        )
        free = [lane for lane in found if lane[-1][0] <= each["begun"]]
        if free:
            lane = max(free, key=lambda lane: lane[-1][0])
        else:
            lane = []
            found.append(lane)
        before = lane[-1][1] if lane else 0
        rows = each["images"] // len(ends)
        lane += [(end, before + rows * (number + 1)) for number, end in enumerate(ends)]
    return found


def steady_rate(found: list[list[tuple[float, int]]]) -> float:
    """Return images per second of all workers together, while all of them are busy."""
    begin, end = max(lane[0][0] for lane in found), min(lane[-1][0] for lane in found)
    done = [np.interp([begin, end], *map(np.asarray, zip(*lane))) for lane in found]
    return float(sum(after - before for before, after in done) / (end - begin))


def turn(side: str, work: Work) -> tuple[dict[str, float], dict[str, bytes]]:
    """Return one side's figures, and the bytes that it wrote."""
    groups = work.groups[: len(work.groups) // WORKERS] if side == "one worker" else work.groups
    load = os.getloadavg()[0]
    with work.copy() as (job, store):
        begun = time.time()
        if side == "bare":
            stats = side_by_side(job, groups, WORKERS)
        else:
            with server():
                begun = time.time()
                stats, _ = through_prefect(job, groups, "dask", 1 if side == "one worker" else WORKERS)
        found = lanes(stats, groups, store)
        written = arrays(store)
    if len(found) != (1 if side == "one worker" else WORKERS):
        raise SystemExit(f"{side}: the groups were encoded by {len(found)} workers: take longer ones (--seconds)")
    gaps = [later - earlier for lane in found for (earlier, _), (later, _) in pairwise(lane)]
    figures = {
        "images_per_s": steady_rate(found),
        "before_first_group_s": min(each["begun"] for each in stats) - begun,
        "before_steady_s": max(lane[0][0] for lane in found) - begun - median(gaps),
        "group_s": median(each["seconds"] for each in stats), "load": load,
    }  # fmt: skip
    return figures, written


def arrays(store: Path) -> dict[str, bytes]:
    """Return the stored arrays of a functaset."""
    chunks = (path for path in store.glob("fragments/*/*/c/**/*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in chunks}


def planned_work(folder: Path, options: argparse.Namespace) -> Work:
    """Return groups of the wanted duration, by a rate that is measured first."""
    (folder / "calibration").mkdir()
    probe = Work(folder / "calibration", options, shard_rows=8 * options.batch, groups=1, shards=SHARDS)
    with probe.copy() as (job, store):  # fills the compiler's cache too
        stats = side_by_side(job, probe.groups, 1)
        found = lanes(stats, probe.groups, store)
    rate = steady_rate(found)
    shard_rows = max(1, round(1.15 * rate * options.seconds / SHARDS / options.batch)) * options.batch
    (folder / "measured").mkdir()
    work = Work(folder / "measured", options, shard_rows, options.groups, SHARDS)
    work.mode = stats[0]["mode"]
    return work


def measure_encoding(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of encoding: medians over the turns, ratios turn by turn."""
    work = planned_work(folder, options)
    shard_rows = work.job.encode.shard_rows
    turns: list[dict[str, dict[str, float]]] = []
    reference: dict[str, bytes] = {}
    for _ in range(options.alternations):
        turns.append({})
        for side in SIDES:
            turns[-1][side], written = turn(side, work)
            reference = reference or written
            if any(reference[name] != data for name, data in written.items()):
                raise SystemExit(f"{side}: wrote other bytes than the first bare processes")
            print(json.dumps({"side": side} | turns[-1][side]), file=sys.stderr, flush=True)

    def middle(name: str) -> dict[str, float]:
        return {side: round(median(each[side][name] for each in turns), 2) for side in SIDES}

    over = {
        peer: [each["two workers"]["images_per_s"] / each[peer]["images_per_s"] for each in turns] for peer in SIDES
    }
    return {
        "name": "dispatch", "piece": "encoding",
        "config": configuration(options) | {"rows_per_group": SHARDS * shard_rows},
        "images_per_s": middle("images_per_s"), "group_s": middle("group_s"),
        "ratio": round(median(over["bare"]), 3), "ratios": [round(ratio, 3) for ratio in over["bare"]],
        "over_one_worker": round(median(over["one worker"]), 3),
        "over_one_worker_each": [round(ratio, 3) for ratio in over["one worker"]],
        "before_first_group_s": middle("before_first_group_s"), "before_steady_s": middle("before_steady_s"),
        "mode": work.mode, "load": middle("load"), "alternations": len(turns), "cpus": os.cpu_count(),
    }  # fmt: skip


def measure_pool(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a pool's workers beside as many bare processes: rates, and CPU seconds of each side."""
    work = planned_work(folder, options)
    turns: list[dict[str, dict[str, float]]] = []
    for _ in range(options.alternations):
        figures: dict[str, dict[str, float]] = {}
        written: dict[str, dict[str, bytes]] = {}
        for side in ("bare", "pool"):
            begun, used, load, served = time.time(), cpu_of_children(), os.getloadavg()[0], 0.0
            with work.copy() as (job, store):
                if side == "bare":
                    stats = side_by_side(job, work.groups, options.pool)
                    seconds = time.time() - begun
                else:
                    with pool(folder / "root", options.pool) as server_cpu:
                        before = server_cpu()
                        stats, seconds = through_prefect(job, work.groups, "prefect", options.pool)
                        served = server_cpu() - before
                found = lanes(stats, work.groups, store)
                written[side] = arrays(store)
            figures[side] = {
                "images_per_s": steady_rate(found), "workers": len(found), "seconds": seconds,
                "group_s": median(each["seconds"] for each in stats), "load": load,
                "cpu_s": cpu_of_children() - used, "server_cpu_s": served,
            }  # fmt: skip
            print(json.dumps({"side": side} | figures[side]), file=sys.stderr, flush=True)
        if written["bare"] != written["pool"]:
            raise SystemExit("the pool's workers wrote other bytes than bare processes")
        turns.append(figures)
    ratios = [each["pool"]["images_per_s"] / each["bare"]["images_per_s"] for each in turns]
    return {
        "name": "dispatch", "piece": "pool", "workers": options.pool, "config": configuration(options),
        "turns": turns, "ratio": round(median(ratios), 3), "cpus": os.cpu_count(),
    }  # fmt: skip


def cpu_of_children() -> float:
    """Return the CPU seconds of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_empty(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each runner: seconds per finished group, by the number of groups."""
    counts = sorted(map(int, options.empty.split(",")))
    work = Work(folder, argparse.Namespace(**vars(options) | {"eager": True}), 4, counts[-1], 1)
    job = work.job
    encode_bare(job, work.groups, 1)
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    with server():
        for _ in range(options.alternations):
            for runner in ("threads", "dask"):
                for count in counts:
                    stats, seconds = through_prefect(job, work.groups[:count], runner, WORKERS)
                    assert not any(each["images"] for each in stats)
                    begun = sorted(each["begun"] for each in stats)[WORKERS:]
                    each = {"per_group": (begun[-1] - begun[0]) / max(1, len(begun) - 1), "in_all": seconds}
                    found.setdefault(runner, {}).setdefault(count, []).append(each)
    rows = []
    for runner, by_count in found.items():
        measured = {
            name: {str(count): round(median(each[name] for each in turns), 4) for count, turns in by_count.items()}
            for name in ("per_group", "in_all")
        }
        flat = measured["per_group"][str(counts[-1])] / max(1e-9, measured["per_group"][str(counts[0])])
        rows.append({
            "name": "dispatch", "piece": "empty groups", "runner": runner, "workers": WORKERS,
            "seconds_per_group": measured["per_group"], "seconds_in_all": measured["in_all"], "ratio": round(flat, 2),
            "alternations": options.alternations, "cpus": os.cpu_count(),
        })  # fmt: skip
    return rows


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the rows of all sides share."""
    named = {name: getattr(options, name) for name in ("preset", "batch", "seconds", "groups", "set")}
    return named | {"shards_per_group": SHARDS, "compiled": not options.eager, "real_images": bool(options.images)}


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of train.npz; none: noise")
    parser.add_argument("--preset", default="cifar10_8x8x16_fast")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the preset")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each group at least")
    parser.add_argument("--groups", type=int, default=2 * WORKERS)
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--empty", default="10,30,100,300", help="numbers of empty groups")
    parser.add_argument("--pool", type=int, default=0, help="workers of a pool beside as many bare processes, alone")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    workers = options.pool or WORKERS
    if options.groups < workers or options.groups % workers or options.alternations < 1:
        parser.error(f"--groups is a multiple of {workers}, --alternations 1 at least")
    options.set = [*options.set, f"encode.batch={options.batch}"]
    options.shape = (32, 32, 3)
    return options


def main() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = arguments()
    if options.bare:
        print(json.dumps(encode_bare_from(sys.stdin.read())))
        return
    measures: list[Callable[[Path, argparse.Namespace], Any]] = [measure_empty, measure_encoding]
    if options.pool:
        measures = [measure_pool]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, measure in enumerate(measures):
            place = Path(folder, str(number))
            place.mkdir()
            found = measure(place, options)
            rows += found if isinstance(found, list) else [found]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
