"""Fail the k-th storage operation of some work, for every k; do the work again, and compare the bytes.

Each try is a fork, so that nothing of it outlives it; zarr's event loop must not run in the process that forks. An
operation is a call of a location's method: a change (create, write, delete), a read, or a look (entry, entries).
"""

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from functa.storage.errors import FunctaError
from functa.storage.places import local
from functa.storage.places.local import LocalLocation
from tests.helpers.storage.functasets import tree

CHANGES, READS, LOOKS = ("create", "write", "delete"), ("read",), ("entry", "entries", "listing", "leftovers")

ACTIONS = {
    "kill": CHANGES,  # SIGKILL once the temporary file is written; before a deletion
    "raise": CHANGES + READS + LOOKS,  # the file system does not answer
    "full": ("create", "write"),  # no space left once the temporary file is written
    "short": READS,  # half of the bytes
    "lost": CHANGES,  # done, and the answer is an error
}


@dataclass(frozen=True)
class Work:
    """Something to be done in a folder that is a copy of `before`, however often it failed there."""

    do: Callable[[Path], None]
    check: Callable[[Path], None] = lambda path: None  # of what readers see after a failure
    before: Path | None = None
    may_be_left: Callable[[str], bool] = lambda key: False  # in addition to the undisturbed run's files
    apart: Callable[[str], bool] = lambda key: False  # files that are compared by their content's meaning
    meaning: Callable[[Path], object] = lambda path: None


@dataclass
class Fault:
    """The fault of one action at the k-th operation; k=0: none."""

    action: str
    k: int
    fired: bool = False
    counted: Any = field(default_factory=lambda: itertools.count(1))
    here: threading.local = field(default_factory=threading.local)

    def install(self) -> None:
        """Let this process meet the fault."""
        for name in ACTIONS[self.action]:
            setattr(LocalLocation, name, self._counting(getattr(LocalLocation, name), name))
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if getattr(self.here, "kill", False):
                os.kill(os.getpid(), signal.SIGKILL)
            if getattr(self.here, "full", False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        os.fsync = fsync
        local.open = self._open  # type: ignore[attr-defined]

    def _open(self, *arguments: Any, **options: Any) -> Any:
        if getattr(self.here, "short", False):
            return nullcontext(_Half(*arguments, **options))
        return open(*arguments, **options)

    def _counting(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(location: LocalLocation, *arguments: Any, **options: Any) -> Any:
            if next(self.counted) != self.k:
                return method(location, *arguments, **options)
            self.fired = True
            return self._meet(method, name, location, *arguments, **options)

        return call

    def _meet(
        self, method: Callable[..., Any], name: str, location: LocalLocation, *arguments: Any, **options: Any
    ) -> Any:
        key = arguments[0] if arguments else ""
        if self.action == "raise":
            with location._translated(key):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if self.action == "kill" and name == "delete":
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(self.here, self.action, True)
        try:
            answer = method(location, *arguments, **options)
        finally:
            setattr(self.here, self.action, False)
        if self.action == "kill":  # there was nothing to write
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "lost":
            with location._translated(key):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return answer


class _Half:
    """A file of which half can be read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file = open(*arguments, **options)  # noqa: SIM115  closed when it was read

    def fileno(self) -> int:
        return int(self._file.fileno())

    def read(self) -> bytes:
        with self._file as file:
            data: bytes = file.read()
        return data[: len(data) // 2]


def tried(act: Callable[[], object], fault: Fault | None = None) -> dict[str, Any]:
    """Do it in a fork; return {fired, operations, error}, or {} where it was killed. Other errors are raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer: dict[str, Any] = {"error": ""}
        try:
            if fault is not None:
                fault.install()
            act()
        except FunctaError as error:
            answer["error"] = str(error)
        except BaseException:
            answer["crash"] = traceback.format_exc()
        answer["modules"] = sorted(sys.modules)
        if fault is not None:
            answer |= {"fired": fault.fired, "operations": next(fault.counted) - 1}
        with open(writing, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not text:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"ended with {status}"
        return {}
    answer = json.loads(text)
    assert "crash" not in answer, answer["crash"]
    for name in answer["modules"]:  # so that the next fork need not import them
        if name not in sys.modules:
            with suppress(Exception):
                import_module(name)
    return answer


def done(act: Callable[[], object]) -> None:
    """Do it in a fork that must succeed."""
    answer = tried(act)
    assert not answer["error"], answer["error"]


def fail_everywhere(work: Work, folder: Path, action: str, every: int = 1) -> dict[str, Any]:
    """Fail every k-th operation of the work, or one in `every`; return the counts of what happened.

    operations: of an undisturbed run; failed: tries that ended with an error of one line; killed; passed: tries that
    ended well in spite of the fault; left: files in addition to those of the undisturbed run.
    """
    counting = Fault(action, 0)
    reference = _copy(work, folder / "reference")
    total = tried(lambda: work.do(reference), counting)["operations"]
    wanted, meant = tree(reference), work.meaning(reference)
    counts: Counter[str] = Counter(failed=0, killed=0, passed=0, left=0)
    for k in itertools.count(1, every):
        path = _copy(work, folder / "try")
        answer = tried(lambda path=path: work.do(path), Fault(action, k))  # type: ignore[misc]
        if answer and not answer["fired"]:
            break
        assert "\n" not in answer.get("error", "")
        counts["killed" if not answer else "failed" if answer["error"] else "passed"] += 1
        where = f"{action} at operation {k}: {answer.get('error')}"
        try:
            done(lambda path=path: (work.check(path), work.do(path)))  # type: ignore[misc]
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
        found = tree(path)
        differing = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
        differing = {key for key in differing if not work.apart(key)}
        assert work.meaning(path) == meant, f"{where}: means something else than an undisturbed run"
        left = {key for key in differing - wanted.keys() if work.may_be_left(key)}
        assert differing == left, f"{where}: these differ from an undisturbed run: {sorted(differing - left)[:8]}"
        counts["left"] += len(left)
    return {"action": action, "operations": total, "tries": sum(counts.values()) - counts["left"], **counts}


def _copy(work: Work, path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    if work.before is None:
        path.mkdir(parents=True)
    else:
        shutil.copytree(work.before, path)
    return path
