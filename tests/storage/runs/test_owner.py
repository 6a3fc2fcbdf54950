"""The process that works on a stage: known by the kernel, whatever clock and host name are now."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from functa.storage.runs import owner
from functa.storage.runs.owner import lives_here, this_process


def test_this_process_lives_and_others_of_its_number_do_not() -> None:
    host, pid, start = this_process().split("/")
    assert (host, pid) == (socket.gethostname(), str(os.getpid()))
    assert lives_here(this_process())
    assert not lives_here(f"{host}/{pid}/{start}0")
    assert not lives_here(f"{host}/{2**22 + 1}/{start}")
    for garbled in ("", "host", f"{host}/x/{start}", f"{host}//"):
        assert not lives_here(garbled)


@pytest.mark.faults
def test_a_stepped_clock_changes_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_process()
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3)
    assert this_process() == before
    assert lives_here(before)


def test_a_machine_with_another_name_knows_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_process()
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop-at-home")
    assert lives_here(before)
    assert this_process() != before


def test_a_process_before_a_reboot_has_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = this_process()
    (tmp_path / "boot_id").write_text("another boot")
    monkeypatch.setattr(owner, "BOOT", tmp_path / "boot_id")
    assert not lives_here(before)


def test_an_owner_that_an_older_version_recorded_is_known() -> None:
    started = f"{psutil.Process().create_time():.2f}"
    assert lives_here(f"{socket.gethostname()}/{os.getpid()}/{started}")
    assert not lives_here(f"elsewhere/{os.getpid()}/{started}")


def test_a_killed_process_has_ended() -> None:
    code = "from functa.storage.runs.owner import this_process; print(this_process(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert lives_here(name)
        other.kill()
        other.wait()
    assert not lives_here(name)
