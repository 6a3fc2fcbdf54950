"""Child processes that are watched while they run and leave nothing behind when they are stopped."""

import contextlib
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from functa.flows.server.api import OperateError

if TYPE_CHECKING:
    import psutil


GRACE_SECONDS = 15  # between TERM and KILL: a flow run uses it to report that it was ended

POLL_SECONDS = 0.2

MOST_SECONDS = 300  # that are waited for a child which computes but is not ready: other work may take the machine

GROWTH_SECONDS = 15  # within which such a child uses more processor time

MARK = "FUNCTA_CHILD"  # environment variable


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP arrived while waiting."""


class Patience:
    """The time that a process gets to be ready: `seconds`, and up to MOST_SECONDS while its processor time grows."""

    def __init__(self, process: int, seconds: float) -> None:
        self._process, self._begun = process, time.monotonic()
        self._deadline, self._growth = self._begun + seconds, min(GROWTH_SECONDS, seconds)
        self._used = processor_seconds(process)

    def is_over(self) -> bool:
        """Return whether the time is up."""
        if (now := time.monotonic()) <= self._deadline:
            return False
        used = processor_seconds(self._process)
        if used <= self._used or now + self._growth > self._begun + MOST_SECONDS or not self._growth:
            return True
        self._used, self._deadline = used, now + self._growth
        return False

    def waited(self) -> float:
        """Return for how many seconds the process had time."""
        return time.monotonic() - self._begun


def processor_seconds(process: int) -> float:
    """Return the processor time of a process and of those that it started; 0 where it has ended."""
    import psutil

    used = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process)
        for each in (parent, *parent.children()):
            with contextlib.suppress(psutil.Error):
                used += sum(each.cpu_times()[:2])
    return used


@dataclass(frozen=True)
class Child:
    """A process that was started here, in a session of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    mark: str

    def death(self) -> str:
        """Return one line: the child, how it ended, the last line of its output, its log."""
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the {self.name} {how}{': ' + lines[-1] if lines else ''}; log: {self.log}"


def start(name: str, command: list[str], environment: dict[str, str], folder: Path, log: Path) -> Child:
    """Start a child whose output goes to the log, out of reach of the terminal's Ctrl-C."""
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    if log.exists():  # it may explain why the last one ended
        log.replace(log.with_suffix(f"{log.suffix}.1"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(name, process, log, mark)


@contextlib.contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Collect signals that ask for an end instead of acting on them; restore the old handlers afterwards."""
    caught: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        before[number] = signal.signal(number, lambda received, _: caught.append(received))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(
    children: list[Child],
    caught: list[int],
    done: Callable[[], bool],
    seconds: float | None = None,
    late: Child | None = None,
) -> None:
    """Wait until done, watching the children. Raises Interrupted, or OperateError when one died or time is up.

    seconds: for the child that is waited for, `late` or the last one, which gets more as long as it computes.
    """
    late = late or children[-1]
    patience = None if seconds is None else Patience(late.process.pid, seconds)
    while not done():
        if caught:
            raise Interrupted
        for child in children:
            if child.process.poll() is not None:
                raise OperateError(child.death())
        if patience is not None and patience.is_over():
            raise OperateError(f"the {late.name} was not ready within {patience.waited():.0f} s; log: {late.log}")
        time.sleep(POLL_SECONDS)


def stop(children: list[Child], caught: list[int]) -> None:
    """End the children, last started first, each after the processes that it started in turn.

    So a flow run can still report its end to the worker, and the worker to the server.
    """
    for child in reversed(children):
        end(partial(_started_by, child), caught)
        end(partial(family, child), caught)
        child.process.wait()


def left_behind(port: int) -> list[int]:
    """Return the ids of a server and workers of this port whose parent was killed, and could not stop them."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            ours = MARK in environment and environment.get("PREFECT_SERVER_API_PORT") == str(port)
            if ours and process.ppid() == 1 and alive(process):
                found.append(process.pid)
    return sorted(found)


def family(child: Child) -> "set[psutil.Process]":
    """Return the child and everything that it started, by the mark that they inherited.

    A flow run is a session of its own, and an orphan once its worker was killed: neither group nor parent finds it.
    """
    import psutil

    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == child.mark:
                found.add(process)
    return found


def _started_by(child: Child) -> "set[psutil.Process]":
    return {process for process in family(child) if process.pid != child.process.pid}


def end(members: "Callable[[], set[psutil.Process]]", caught: list[int]) -> None:
    """Send TERM, and after the grace or a second Ctrl-C KILL, until no member is left, those started later included.

    TERM goes only to members whose parent is no member: a flow run that gets it first stops its training itself and is
    recorded as crashed; if the training ended first, the run would be recorded as failed.
    """
    import psutil

    deadline = time.monotonic() + GRACE_SECONDS
    known: set[psutil.Process] = set()
    sent: dict[psutil.Process, int] = {}
    while known := {member for member in known | members() if alive(member)}:
        number = signal.SIGKILL if time.monotonic() > deadline or len(caught) > 1 else signal.SIGTERM
        for member in known if number == signal.SIGKILL else _topmost(known):
            if sent.get(member) != number:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
                sent[member] = number
        time.sleep(POLL_SECONDS)


def _topmost(members: "set[psutil.Process]") -> "list[psutil.Process]":
    """Return the members whose parent is no member."""
    import psutil

    numbers, topmost = {member.pid for member in members}, []
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.ppid() not in numbers:
                topmost.append(member)
    return topmost


def alive(member: "psutil.Process") -> bool:
    """Return whether the process still runs; a zombie does not."""
    import psutil

    try:
        return bool(member.is_running() and member.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
