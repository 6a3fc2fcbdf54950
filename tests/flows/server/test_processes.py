"""Processes that `functa up` starts: named when they die, ended with all that they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from functa.flows.server import processes
from functa.flows.server.api import OperateError
from functa.flows.server.up import up
from tests.helpers.flows.prefect_server import eventually, free_port

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
    "time.sleep(600)\n"
)


def begin(code: str, folder: Path) -> processes.Child:
    return processes.start(
        "helper", [sys.executable, "-c", code], dict(os.environ), folder, folder / "logs" / "helper.log"
    )


def test_a_child_that_dies_is_named_with_its_last_word_and_its_log(tmp_path: Path) -> None:
    child = begin("raise SystemExit('no space left')", tmp_path)
    with pytest.raises(OperateError) as caught:
        processes.wait([child], [], lambda: False, 30)
    assert str(caught.value) == f"the helper ended with status 1: no space left; log: {child.log}"


def test_a_child_that_never_gets_ready_is_an_error(tmp_path: Path) -> None:
    child = begin("import time; time.sleep(600)", tmp_path)
    with pytest.raises(OperateError, match=r"the helper was not ready within \d+ s; log: "):
        processes.wait([child], [], lambda: False, 0.2)
    processes.stop([child], [])
    assert child.process.returncode == -signal.SIGTERM


def test_a_child_that_computes_gets_more_time_and_one_that_sleeps_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MOST_SECONDS", 3)
    child = begin("while True: pass", tmp_path)
    begun = time.monotonic()
    processes.wait([child], [], lambda: time.monotonic() > begun + 1.5, 0.5)
    with pytest.raises(OperateError, match="was not ready within"):
        processes.wait([child], [], lambda: False, 0.5)
    assert time.monotonic() > begun + 1.5 + 0.5
    processes.stop([child], [])


@pytest.mark.parametrize("parent_killed", [False, True])
def test_stop_ends_grandchildren_in_other_sessions_that_ignore_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent_killed: bool
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1)
    child = begin(PARENT, tmp_path)
    eventually(lambda: "up" in child.log.read_text(), 30, "the grandchild is up")
    (grandchild,) = psutil.Process(child.process.pid).children()
    if parent_killed:
        child.process.kill()
        child.process.wait()
    processes.stop([child], [])
    assert not processes.alive(grandchild)
    assert child.process.returncode is not None


ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"


def test_what_a_killed_up_left_behind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(port))
    monkeypatch.setenv(processes.MARK, "of-a-killed-up")
    subprocess.run([sys.executable, "-c", ORPHAN], check=True)
    (left,) = eventually(lambda: processes.left_behind(port), 10, "the orphan is found")
    try:
        if psutil.Process(left).ppid() != 1:
            pytest.skip("orphans have another parent here")
        monkeypatch.setattr("functa.flows.server.up.port_fault", lambda _: "is taken by a Prefect server")
        with pytest.raises(OperateError, match=rf"end them \(kill {left}\), then start again"):
            up(port)
    finally:
        psutil.Process(left).kill()
    assert processes.left_behind(free_port()) == []


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    child = begin(STUBBORN, tmp_path)
    eventually(lambda: "up" in child.log.read_text(), 30, "the child is up")
    began = time.monotonic()
    processes.stop([child], [signal.SIGINT, signal.SIGINT])
    assert child.process.returncode == -signal.SIGKILL
    assert time.monotonic() - began < processes.GRACE_SECONDS
