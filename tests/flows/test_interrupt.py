"""Ctrl-C and SIGKILL in the middle of a run: nothing outlives it, and the same command ends where it would have."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.flows.tiny_config import TINY

PROJECT = Path(__file__).parents[2]
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]
# Long enough to be interrupted in, and both trainings log often.
LONG = [*TINY, "classifier.steps=2000", "diffusion.steps=1500", "classifier.log_every=5", "diffusion.log_every=5"]


def command(root: Path) -> list[str]:
    sets = [part for override in LONG for part in ("--set", override)]
    return [
        sys.executable,
        "-c",
        "from functa.flows.cli.main import main; main()",
        "run",
        "digits",
        *sets,
        "--root",
        str(root),
    ]


def started(root: Path, stage: str) -> bool:
    return (root / "checkpoints" / stage).is_dir() or (root / "stages" / f"train_{stage}.json").exists()


def run_until_both_train(root: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Start a run; return it and its descendants once classifier and diffusion train side by side."""
    with open(root.parent / "log", "ab") as log:
        process = subprocess.Popen(command(root), cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        if sum("functa.tasks.training" in " ".join(cmdline(p)) for p in below) >= 2 and started(root, "diffusion"):
            time.sleep(8)  # into their steps
            return process, psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    raise AssertionError((root.parent / "log").read_text()[-3000:])


def in_terminal(arguments: list[str], until: bytes, home: Path) -> tuple[int, int, bytes]:
    """Run the command in a terminal of its own until it prints the word; return process, terminal, output."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(PROJECT)
        os.execve(arguments[0], arguments, os.environ | {"PREFECT_HOME": str(home)})
    output = b""
    while until not in output:
        more = read(terminal, 240)
        assert more, output.decode()[-3000:]
        output += more
    return process, terminal, output


def read(terminal: int, seconds: float) -> bytes:
    """Return some bytes; none if the other end has closed."""
    assert select.select([terminal], [], [], seconds)[0], "silence"
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux raises it when no process holds the terminal any more
        return b""


def test_a_typed_interrupt_ends_the_command_in_seconds_with_its_server(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole foreground group: the embedded server must outlive it to record the end."""
    endless = [*command(tmp_path / "root"), "--set", "meta_train.steps=1000000"]
    process, terminal, output = in_terminal(endless, b" images/s", tmp_path / "prefect")
    below = psutil.Process(process).children(recursive=True)
    assert any("functa.flows.server.guarded" in " ".join(cmdline(p)) for p in below)
    began = time.monotonic()
    os.write(terminal, b"\x03")
    while more := read(terminal, 60):
        output += more
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    assert status == 130, output.decode()[-3000:]
    assert time.monotonic() - began < 45  # it used to be more than a minute, on an idle machine
    (last,) = [line for line in output.decode().splitlines() if line.startswith("functa:")]
    assert last == "functa: interrupted; the same command continues where this one stopped"
    assert "Traceback" not in output.decode()
    assert all_end(below, 10)


@pytest.mark.parametrize("group", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_terminated_command_leaves_no_server(group: bool, tmp_path: Path) -> None:
    """Also where the whole group is ended (`timeout`, a service manager): the server records how the run ended."""
    endless = [*command(tmp_path / "root"), "--set", "meta_train.steps=1000000"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(endless, cwd=PROJECT, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 240
    while b" images/s" not in log.read_bytes():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("functa.flows.server.guarded" in " ".join(cmdline(p)) for p in below)
    os.killpg(process.pid, signal.SIGTERM) if group else process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    assert all_end(below, 30)
    assert log.read_text().rstrip().splitlines()[-1].endswith("the same command continues where this one stopped")


def all_end(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
