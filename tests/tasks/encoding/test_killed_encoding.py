"""Kill processes while photographs are encoded: the run or its rerun ends with the bytes of an undisturbed run.

A server, a worker for each of two devices (which exist by name only), and SIGKILL for each kind of process in turn.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.server.worker import LEASE_SECONDS
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.worker_cluster import Cluster, cluster

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.faults,
    pytest.mark.timeout(1200),
]

SHARDS = 20
RUN_SECONDS = 400  # for one encoding on a busy machine
WATCH_SECONDS = 240  # the automation needs 90, and the server adds its own delays
OVERRIDES = [
    "images.limit=3000",
    "meta_train.steps=20",
    "meta_train.warmup=0",
    "meta_train.validation_images=16",
    "field.width=64",
    "field.depth=4",
    "inner.compile=off",
    "inner.precision=float32",
    "encode.shard_rows=256",
    "encode.chunk_rows=128",
    "encode.group_shards=2",
    "encode.calibration_images=256",
]


@pytest.fixture(scope="module")
def images(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "cifar10"
    subprocess.run([sys.executable, shared / "data" / "unpack.py", "cifar10_subset", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def config(images: Path) -> PipelineConfig:
    return load_config("cifar10_quick", [f"images.location={images}", *OVERRIDES])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(workplace: Cluster, config: PipelineConfig) -> dict[str, str]:
    """Return the stored bytes of an undisturbed run; all runs reuse the field of one other root."""
    workplace.start_worker("gpu", "0")
    parameters = config.model_dump(mode="json")
    ends(
        workplace, workplace.run("meta-train", root=str(root_named(workplace, "field")), config=parameters), "COMPLETED"
    )
    ends(workplace, begin(workplace, config, "undisturbed"), "COMPLETED")
    end_workers(workplace)
    return stored(root_named(workplace, "undisturbed"))


@pytest.fixture
def two_workers(workplace: Cluster, undisturbed: dict[str, str]) -> Iterator[list[str]]:
    """Start workers with a device each; yield their names, and end them and their runs after the test."""
    eventually(lambda: workplace.slots_held() == 0, WATCH_SECONDS, "all slots are free")
    yield [workplace.start_worker("gpu", device) for device in "01"]
    end_workers(workplace)


def root_named(workplace: Cluster, name: str) -> Path:
    return workplace.folder / "roots" / name


def end_workers(workplace: Cluster) -> None:
    """End them at once, and runs that a failed test left behind."""
    for name in workplace.processes:
        if name.startswith("gpu-"):
            workplace.kill(name)
    for process in workplace.flow_processes():
        process.kill()


def stored(root: Path) -> dict[str, str]:
    """Return digests of the stored arrays by split and path; fragments have other names in each run."""
    found = {}
    for plan in sorted((root / "functaset.zarr" / "fragments").glob("*/plan.json")):
        split = json.loads(plan.read_text())["split"]
        for file in sorted(plan.parent.glob("*/c/**/*")):
            if file.is_file():
                name = f"{split}/{file.relative_to(plan.parent)}"
                assert name not in found, "two fragments of a split"
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert len([name for name in found if "/z/" in name]) == SHARDS
    return found


def begin(workplace: Cluster, config: PipelineConfig, name: str, **dispatch: Any) -> str:
    """Start the encoding into a root of that name; return its run."""
    changed = config.model_copy(update={"dispatch": config.dispatch.model_copy(update=dispatch)})
    source = root_named(workplace, "field")
    return workplace.run(
        "encode", root=str(root_named(workplace, name)), from_root=str(source), config=changed.model_dump(mode="json")
    )


def receipts(workplace: Cluster, name: str) -> int:
    return len(list((root_named(workplace, name) / "functaset.zarr").glob("fragments/*/receipts/*")))


def middle(workplace: Cluster, name: str, run: str) -> None:
    """Wait until some shards are written and most are not."""
    eventually(
        lambda: receipts(workplace, name) >= 4 or workplace.state(run) not in ("SCHEDULED", "PENDING", "RUNNING"),
        RUN_SECONDS,
        f"{name} is in the middle of it",
    )
    assert workplace.state(run) == "RUNNING", workplace.ask(f"flow_runs/{run}")["state"]["message"]
    assert receipts(workplace, name) <= SHARDS - 6, "too late to disturb"


def ends(workplace: Cluster, run: str, state: str, seconds: float = RUN_SECONDS) -> None:
    eventually(lambda: workplace.state(run) not in ("SCHEDULED", "PENDING", "RUNNING"), seconds, f"run {run} ends")
    ended = workplace.ask(f"flow_runs/{run}")["state"]
    assert ended["type"] == state, ended["message"]


def test_a_run_whose_dask_worker_is_killed_completes_with_the_same_bytes(
    workplace: Cluster, config: PipelineConfig, two_workers: list[str], undisturbed: dict[str, str]
) -> None:
    run = begin(workplace, config, "dask", runner="dask", workers=2)
    middle(workplace, "dask", run)
    nannies = [p for flow in workplace.flow_processes() for p in flow.children(recursive=True) if is_dask_worker(p)]
    assert len(nannies) == 2
    nannies[0].kill()
    ends(workplace, run, "COMPLETED")
    assert stored(root_named(workplace, "dask")) == undisturbed
    eventually(lambda: not workplace.flow_processes(), 60, "no process is left")


def is_dask_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_rerun_completes_the_work_of_a_killed_flow_process(
    workplace: Cluster, config: PipelineConfig, two_workers: list[str], undisturbed: dict[str, str]
) -> None:
    run = begin(workplace, config, "flow")
    middle(workplace, "flow", run)
    done = receipts(workplace, "flow")
    (process,) = workplace.flow_processes()
    process.kill()
    ends(workplace, run, "CRASHED", 60)
    # Its lease expires, unless the server freed the slot at once.
    eventually(lambda: workplace.slots_held() == 0, LEASE_SECONDS + 60, "the slot is free")
    again = begin(workplace, config, "flow")
    ends(workplace, again, "COMPLETED")
    assert done >= 4
    assert stored(root_named(workplace, "flow")) == undisturbed


def test_a_run_continues_when_its_prefect_worker_is_killed(
    workplace: Cluster, config: PipelineConfig, two_workers: list[str], undisturbed: dict[str, str]
) -> None:
    run = begin(workplace, config, "worker")
    middle(workplace, "worker", run)
    (process,) = workplace.flow_processes()
    (holder,) = [name for name in two_workers if workplace.processes[name].pid == process.ppid()]
    workplace.kill(holder)
    ends(workplace, run, "COMPLETED")
    assert stored(root_named(workplace, "worker")) == undisturbed


def test_the_automation_marks_a_run_as_crashed_when_worker_and_flow_are_killed(
    workplace: Cluster, config: PipelineConfig, two_workers: list[str], undisturbed: dict[str, str]
) -> None:
    """The same happens when a machine fails: no process is left to report how the run ended."""
    run = begin(workplace, config, "machine")
    middle(workplace, "machine", run)
    (process,) = workplace.flow_processes()
    (holder,) = [name for name in two_workers if workplace.processes[name].pid == process.ppid()]
    workplace.kill(holder)
    process.kill()
    again = begin(workplace, config, "machine")  # taken by the other worker: there are two slots
    ends(workplace, run, "CRASHED", WATCH_SECONDS)
    assert "No heartbeat" in workplace.ask(f"flow_runs/{run}")["state"]["message"]
    ends(workplace, again, "COMPLETED")
    eventually(lambda: workplace.slots_held() == 0, LEASE_SECONDS + 60, "the slot is free")
    assert stored(root_named(workplace, "machine")) == undisturbed


def for_half_a_minute(workplace: Cluster) -> None:
    time.sleep(30)


def when_the_run_ends(workplace: Cluster) -> None:
    """The slot's lease cannot be returned then, which must not fail the finished work."""
    eventually(lambda: receipts(workplace, "when_the_run_ends") == SHARDS, RUN_SECONDS, "every shard is written")
    time.sleep(5)


@pytest.mark.parametrize("away", [for_half_a_minute, when_the_run_ends])
def test_a_run_completes_while_the_server_is_down_and_is_reported_later(
    away: Callable[[Cluster], None],
    workplace: Cluster,
    config: PipelineConfig,
    two_workers: list[str],
    undisturbed: dict[str, str],
) -> None:
    name = away.__name__
    run = begin(workplace, config, name)
    middle(workplace, name, run)
    workplace.kill("server")
    try:
        away(workplace)
    finally:
        workplace.start_server()
    ends(workplace, run, "COMPLETED")
    assert stored(root_named(workplace, name)) == undisturbed
    eventually(lambda: workplace.slots_held() == 0, LEASE_SECONDS + 60, "the slot is free")
