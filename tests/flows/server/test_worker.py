"""One run per device: the workers of `functa up`, the lock of a device, and the messages of a waiting pipeline."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.states import Completed, Running, Scheduled

from functa.flows.config.schema import ConfigError
from functa.flows.server import deployed, worker
from functa.flows.server.api import OperateError
from functa.flows.server.local_workers import workers_of_this_machine
from functa.flows.server.pool import stage_runs
from functa.flows.server.pool.stage_runs import StageFailed, follow
from functa.flows.server.worker import device_lock, gpu_slot
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.fan_out import ended_by
from tests.helpers.flows.prefect_server import PROJECT

HOLDER = """
import sys, time
from functa.flows.server.worker import device_lock
with device_lock("7"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_each_device_has_a_worker_of_one_run_and_the_pipelines_one_without_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    waiting, *computing = workers_of_this_machine(4200, None)
    assert (waiting.queue, waiting.limit, waiting.environment()) == ("cpu", None, {})
    assert "--limit" not in waiting.command()
    assert [each.environment()["CUDA_VISIBLE_DEVICES"] for each in computing] == ["3", "5"]
    for each in computing:
        command = each.command()
        assert (each.queue, command[command.index("--limit") + 1]) == ("gpu", "1")
        assert each.environment()["OMP_NUM_THREADS"] == "4"
    assert len({each.name for each in (waiting, *computing)}) == 3
    assert [each.device for each in workers_of_this_machine(4200, 1)[1:]] == ["3"]


@pytest.mark.parametrize(
    ("gpus", "expected"), [(3, "--gpus 3, but this process sees 2: 3, 5"), (0, "expected at least 1")]
)
def test_an_impossible_number_of_devices_is_wrong_from_the_arguments_alone(
    gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(ConfigError, match=expected):
        workers_of_this_machine(4200, gpus)


def test_without_a_gpu_nothing_is_pinned_and_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    _, *computing = workers_of_this_machine(4200, 2)
    assert [worker.environment() for worker in computing] == [{"OMP_NUM_THREADS": "1"}] * 2


def test_a_device_is_held_by_one_process_and_free_again_when_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    got = threading.Event()

    def take() -> None:
        with device_lock("7"):
            got.set()

    with device_lock("8"):  # another device is nobody's concern
        thread = threading.Thread(target=take)
        thread.start()
        assert not got.wait(2.5)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert got.wait(10)
        thread.join()


class PlayedLimit:
    """prefect's `concurrency`: what comes of each attempt to take a slot (None: it is held), and of giving it back."""

    def __init__(self, *attempts: Exception | None, fault: Exception | None = None) -> None:
        self.attempts, self.fault, self.held = list(attempts), fault, 0

    def __call__(self, *_: object, **__: object) -> "PlayedLimit":
        return self

    def __enter__(self) -> None:
        if (error := self.attempts.pop(0)) is not None:
            raise error
        self.held += 1

    def __exit__(self, *_: object) -> None:
        self.held -= 1
        if self.fault is not None:
            raise self.fault


def refused(cause: Exception | None) -> Exception:
    """Return the error that Prefect wraps the cause in."""
    error = ConcurrencySlotAcquisitionError("Unable to acquire concurrency slots")
    error.__cause__ = cause
    return error


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings that were logged; within, this process is a run of a deployment, without a device."""
    lines: list[str] = []
    log = SimpleNamespace(warning=lines.append, info=lambda line: None)
    monkeypatch.setattr("prefect.get_run_logger", lambda: log)
    monkeypatch.setattr(worker, "started_by_worker", lambda: True)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lines


def test_a_server_that_is_away_when_the_slot_is_given_back_does_not_fail_what_was_done(
    slot: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = PlayedLimit(None, None, fault=httpx.ConnectError("refused"))
    monkeypatch.setattr("prefect.concurrency.sync.concurrency", limit)
    with gpu_slot():
        assert limit.held == 1
    assert slot == ["the end of its slot's lease could not be published: refused"]
    with pytest.raises(KeyError, match="of the stage itself"), gpu_slot():
        raise KeyError("of the stage itself")


def test_a_server_that_is_away_is_waited_for_before_a_slot_is_held(
    slot: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = refused(httpx.ConnectError("refused"))
    monkeypatch.setattr("prefect.concurrency.sync.concurrency", PlayedLimit(away, away, None))
    with gpu_slot():
        assert slot == ["waits for a slot, but the server does not answer (refused)"] * 2
    monkeypatch.setattr(worker, "SILENCE_SECONDS", -1.0)
    monkeypatch.setattr("prefect.concurrency.sync.concurrency", PlayedLimit(away))
    with (
        pytest.raises(OperateError, match=r"no slot of .*'functa-gpu' could be had: refused"),
        gpu_slot(),
    ):
        pass


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (None, "the server has no concurrency limit 'functa-gpu': make it with `python -m functa.deploy.bootstrap`"),
        (ValueError("401 Unauthorized"), "no slot of concurrency limit 'functa-gpu' could be had: 401 Unauthorized"),
    ],
)
def test_a_fault_that_waiting_cannot_fix_is_reported_at_once(
    cause: Exception | None, expected: str, slot: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect.concurrency.sync.concurrency", PlayedLimit(refused(cause)))
    with pytest.raises(OperateError, match=re.escape(expected)), gpu_slot():
        pass


def test_a_group_that_is_cancelled_while_it_waits_for_a_slot_or_a_device_is_not_begun(
    slot: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limit = PlayedLimit(TimeoutError(), TimeoutError(), None)
    monkeypatch.setattr("prefect.concurrency.sync.concurrency", limit)
    over = threading.Event()
    with ended_by(over), gpu_slot():
        assert limit.held == 1, "waiting goes on while nobody cancels it"
    over.set()
    with ended_by(over), pytest.raises(RunEnded), gpu_slot():
        pass
    with device_lock("7"), ended_by(over), pytest.raises(RunEnded), device_lock("7"):
        pass


class Played:
    """A client whose answers about one run are given, the last one for ever."""

    def __init__(self, *answers: Any, polled: bool = True) -> None:
        self.answers = list(answers)
        self.polled = polled

    def read_flow_run(self, _: object) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(state=answer, name="its run", work_queue_name="gpu")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(stage_runs, "get_run_logger", lambda: SimpleNamespace(warning=lines.append))
    monkeypatch.setattr(deployed, "POLL_SECONDS", 0.01)
    return lines


@pytest.mark.parametrize(
    ("unpolled", "expected"),
    [(["gpu"], "encode: no worker has polled queue gpu of pool 'functa' for"), ([], "every worker of queue gpu is at")],
)
def test_a_pipeline_reports_why_its_stage_waits(
    unpolled: list[str], expected: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_runs, "WAITING_SECONDS", 0.05)
    monkeypatch.setattr(stage_runs, "unpolled_queues", lambda client: unpolled)
    client: Any = Played(*[Scheduled()] * 20, Running(), Completed())
    assert follow(client, "run", "encode").state.is_completed()  # type: ignore[arg-type, union-attr]
    assert warnings
    assert expected in warnings[0]


def test_a_server_that_is_away_for_a_while_does_not_fail_the_pipeline(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = httpx.ConnectError("refused")
    client: Any = Played(Running(), away, away, Completed())
    assert follow(client, "run", "encode").state.is_completed()  # type: ignore[arg-type, union-attr]
    monkeypatch.setattr(deployed, "SILENCE_SECONDS", 0.05)
    with pytest.raises(StageFailed, match=r"encode: the server has not answered for 0 s \(ConnectError\)"):
        follow(Played(Running(), away), "run", "encode")  # type: ignore[arg-type]
    assert not warnings
