"""Many units of work at once, in threads and on Dask workers: order, failures, and nothing that outlives them."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed

from functa.flows.stages import encode_groups
from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError, TransientError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places import local
from functa.tasks import prefect_tasks
from functa.tasks.config import AugmentationConfig, DispatchConfig
from functa.tasks.dispatch.child import DispatchError, RunEnded
from functa.tasks.encoding import keyed_images
from functa.tasks.encoding.encode import encode_group
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import EncodeJob, Planned, ShardGroup, plan
from functa.tasks.encoding.progress import Following
from tests.helpers.tasks.dask_processes import scheduler, worker
from tests.helpers.tasks.encoding import encode_job, file_bytes, write_noise
from tests.helpers.tasks.fan_out_process import all_of, pids

PROJECT = Path(__file__).parents[3]
pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def below() -> set[int]:
    """Return the processes that this one has started, without Python's own helper, which ends with it."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())}


@pytest.fixture(autouse=True)
def nothing_is_left(prefect_server: None) -> Iterator[None]:
    """Neither a process nor an environment variable outlives a fan-out."""
    processes, environment = below(), dict(os.environ)
    yield
    assert below() <= processes
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    assert changed <= {"__DASK_PARENT_PID", "PYTEST_CURRENT_TEST"}


def api() -> str:
    return PREFECT_API_URL.value() or ""


def eventually(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
def test_results_are_in_order_and_no_two_units_use_a_device_at_once(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    each = [{"number": n, "folder": str(tmp_path), "seconds": 0.3 - 0.05 * n} for n in range(6)]
    ran = all_of(each, runner=runner, workers=2)
    assert [row["number"] for row in ran] == list(range(6))
    if runner == "threads":
        assert {row["pid"] for row in ran} == {os.getpid()}
        return
    assert {row["CUDA_VISIBLE_DEVICES"] for row in ran} == {"4", "7"}
    for device in "47":
        turns = sorted((row["begun"], row["ended"]) for row in ran if row["CUDA_VISIBLE_DEVICES"] == device)
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(turns))
    assert {(row["threads"], row["OMP_NUM_THREADS"]) for row in ran} == {(1, "1")}  # its share of two
    assert {row["PREFECT_API_URL"] for row in ran} == {api()}


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
def test_the_first_failure_is_raised_soon_and_ends_the_others(runner: str, tmp_path: Path) -> None:
    each = [{"number": n, "folder": str(tmp_path), "seconds": 600} for n in range(8)]
    each[0] |= {"seconds": 1, "fault": "the first of many"}
    with pytest.raises(ValueError, match="the first of many"):
        all_of(each, runner=runner, workers=2)
    begun = {number for number in range(8) if pids(tmp_path, number)}
    assert 0 in begun
    assert len(begun) <= 3  # a third may start where 0 ran, before its failure is known; Dask chooses which
    ended = {number for number in range(8) if (tmp_path / f"{number}-run-ended").exists()}
    assert ended == begun - {0} if runner == "threads" else ended <= begun - {0}  # or their processes were ended first


def test_nothing_to_do_starts_nothing() -> None:
    assert all_of([], runner="dask", workers=2) == []


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_when_the_caller_is_killed_or_interrupted(
    runner: str, how: signal.Signals, tmp_path: Path
) -> None:
    environment = os.environ | {"PREFECT_API_URL": api(), "OMP_NUM_THREADS": "1"}
    asking = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.tasks.fan_out_process", runner, str(tmp_path)],
        cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    eventually(lambda: pids(tmp_path, 0) and pids(tmp_path, 1))
    started = [psutil.Process(asking.pid), *psutil.Process(asking.pid).children(recursive=True)]
    assert len(started) >= (3 if runner == "dask" else 1)
    if how == signal.SIGINT:
        os.killpg(asking.pid, how)  # to all of them, as a terminal does
    else:
        asking.kill()
    _, errors = asking.communicate(timeout=60)
    alive = psutil.wait_procs(started, 60)[1]
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors


def test_a_lost_scheduler_is_reported_and_its_worker_stops(tmp_path: Path) -> None:
    with scheduler() as (address, process), worker(address, "--resources", "GPU=1", PREFECT_API_URL=api()):

        def lose() -> None:
            eventually(lambda: pids(tmp_path, 0))
            process.kill()

        losing = threading.Thread(target=lose)
        losing.start()
        each = [{"number": number, "folder": str(tmp_path), "seconds": 600} for number in range(3)]
        with pytest.raises(DispatchError) as caught:
            all_of(each, runner="dask", address=address)
        losing.join()
        message = f"lost the Dask scheduler {address}; written results are kept, and the same command continues"
        assert str(caught.value) == message
        eventually((tmp_path / "0-run-ended").exists)


def test_a_server_that_does_not_answer_for_a_while_does_not_end_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "encoding.progress.LOOK_SECONDS",
        "dispatch.progress.ARTIFACT_SECONDS",
        "dispatch.progress.LOG_SECONDS",
    ):
        monkeypatch.setattr(f"functa.tasks.{name}", 0.0)
    groups = [ShardGroup(fragment="f", split="train", shards=(n,), images=20) for n in range(3)]
    todo = Planned(groups=tuple(groups), fragments=("f",))
    (receipts := tmp_path / "fragments" / "f" / "receipts").mkdir(parents=True)

    def nobody(*_: object) -> None:
        httpx.get("http://127.0.0.1:9/api")  # a real refusal; a flow's own client never changes its server

    def follow() -> None:
        follow = Following(str(tmp_path), todo)
        for shard in range(2):
            (receipts / f"{shard:06d}.0.json").touch()
            with monkeypatch.context() as away:
                if shard == 0:
                    away.setattr("prefect.artifacts.update_progress_artifact", nobody)
                follow([])

    logging.getLogger("prefect.flow_runs").addHandler(caplog.handler)
    try:
        in_a_flow(follow)
    finally:
        logging.getLogger("prefect.flow_runs").removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("progress could not be published: ") for line in lines)
    assert any(line.startswith("2 of 3 shards, ") for line in lines)


def encoding(field: Path, store: Path) -> tuple[EncodeJob, Planned]:
    """Return a job and its plan: groups of one shard."""
    work = encode_job(field, store, "encode.group_shards=1", "encode.batch=8")[0]
    return work, plan(work)


def arrays(store: Path) -> dict[str, bytes]:
    """Return the files that determine everything that is read; receipts and plans also contain times."""
    return {name: data for name, data in file_bytes(store).items() if "/c/" in name or "/moments/" in name}


@pytest.fixture(scope="module")
def serial(field: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the arrays of a plain loop over the groups, on one thread."""
    store = tmp_path_factory.mktemp("serial")
    work, todo = encoding(field, store)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for group in todo.groups:
        encode_group(work, group, 200)
    torch.set_num_threads(before)
    return arrays(store)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_a_flow(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what the call returns in a flow, and the id of the flow's run."""

    @flow(persist_result=False)
    def around() -> tuple[Any, str]:
        return call(), str(runtime.flow_run.id)

    return around()


def task_states(run: str) -> Counter[str]:
    """Return the states of the run's tasks, as an operator sees them."""
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        return Counter(task.state_name for task in client.read_task_runs(flow_run_filter=chosen))


@pytest.mark.parametrize("runner", ["threads", pytest.param("dask", marks=pytest.mark.slow)])
def test_shards_equal_those_of_a_plain_loop_byte_for_byte(
    runner: str, field: Path, serial: dict[str, bytes], one_thread: None, tmp_path: Path
) -> None:
    work, todo = encoding(field, tmp_path)
    dispatch = DispatchConfig(runner=runner, workers=2)
    stats, run = in_a_flow(lambda: encode_groups(work, todo, dispatch))
    assert arrays(tmp_path) == serial
    assert [each["images"] for each in stats] == [group.images for group in todo.groups]
    # Workers end only after they have reported how their tasks ended.
    eventually(lambda: task_states(run) == {"Completed": len(todo.groups)})


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(
    field: Path, serial: dict[str, bytes], one_thread: None, tmp_path: Path
) -> None:
    work, todo = encoding(field, tmp_path)
    killed: list[int] = []

    def kill() -> None:
        eventually(lambda: list(tmp_path.glob("fragments/*/receipts/*")))
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        killed.append(workers[0].pid)
        workers[0].kill()

    killing = threading.Thread(target=kill)
    killing.start()
    in_a_flow(lambda: encode_groups(work, todo, DispatchConfig(runner="dask", workers=2)))
    killing.join()
    assert killed and arrays(tmp_path) == serial


def test_a_group_whose_run_has_ended_stops_before_its_next_batch(field: Path, tmp_path: Path) -> None:
    work = encode_job(field, tmp_path, "encode.batch=8")[0]
    group = plan(work).groups[0]
    looks = iter([False] * 10 + [True])
    with pytest.raises(RunEnded, match="shard 1 of train was not encoded"):
        encode_group(work, group, 200, run_ended=lambda: next(looks))
    assert [path.name for path in tmp_path.glob("fragments/*/receipts/*")] == [
        "000000.0.json"
    ]  # a complete shard is kept
    encode_group(work, group, 200)
    assert len(list(tmp_path.glob("fragments/*/receipts/*"))) == len(group.shards)


def test_only_transient_failures_are_retried(prefect_server: None) -> None:
    def worth(error: Exception) -> bool:
        return prefect_tasks.worth_retrying(prefect_tasks.train, None, Failed(data=error))  # type: ignore[arg-type]

    assert not any(worth(error) for error in (RunEnded(), StorageError("missing"), ValueError()))
    assert all(worth(error) for error in (TransientError("timeout"), OSError()))


def pictures(folder: Path, count: int) -> None:
    for label in "ab":
        (folder / label).mkdir(parents=True)
    for number in range(count):
        write_noise(folder / "ab"[number % 2] / f"{number:03d}.png", number)


def test_groups_of_a_run_list_no_images_and_images_removed_since_the_planning_are_bad(
    field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad with a reason, and no label shifts."""
    folder = tmp_path / "images"
    pictures(folder, 60)
    overrides = ["images.source=folder", f"images.location={folder}", "images.channels=1"]
    sizes = ["images.max_bad_fraction=0.5", "encode.group_shards=1", "encode.shard_rows=8", "encode.chunk_rows=8"]

    def encoded(name: str, between: Callable[[], None]) -> tuple[Functaset, list[dict[str, str]]]:
        work = encode_job(field, tmp_path / name, *overrides, *sizes, "encode.quantization.bits=32")[0]
        todo = plan(work)
        for number, group in enumerate(todo.groups):
            with monkeypatch.context() as patch:
                patch.setattr(keyed_images, "open_images", None)
                patch.setattr(local.LocalLocation, "listing", None)
                encode_group(work, group, 60, run=name)
            if number == 0:
                between()
        bad = finalise(work, todo)["bad_inputs"]
        return Functaset.open(str(tmp_path / name)), bad

    calm = encoded("calm", lambda: None)[0].load("train")
    late = [str(key) for key in calm.keys[20:22]]

    def change() -> None:
        (folder / late[0]).unlink()
        write_noise(folder / late[1], 4711)
        write_noise(folder / "a" / "!.png", 0)

    functaset, bad = encoded("s", change)
    keyed_images.forget_images()
    assert {each["key"]: each["reason"] for each in bad} == {
        late[0]: "no longer there", late[1]: "changed since it was planned",
    }  # fmt: skip
    stormy = functaset.load("train")
    kept = [row for row, key in enumerate(calm.keys) if key not in late]
    assert [str(key) for key in stormy.keys] == [str(calm.keys[row]) for row in kept]
    np.testing.assert_array_equal(stormy.labels, calm.labels[kept])
    np.testing.assert_array_equal(stormy.dequantized(), calm.dequantized()[kept])


def test_an_image_that_reappears_is_found_by_the_next_run(tmp_path: Path) -> None:
    pictures(tmp_path, 8)
    config = ImagesConfig(source="folder", location=str(tmp_path), channels=1)
    given = config, AugmentationConfig(), (8, 8, 1)
    first = keyed_images.planned_images(*given, "first")
    assert keyed_images.planned_images(*given, "first") is first
    assert keyed_images.planned_images(*given, "second") is not first
    assert keyed_images.planned_images(*given, "") is not first
    keyed_images.forget_images()
    assert not keyed_images._opened
