"""Prefect's embedded server ends with the command that started it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.flows.prefect_server import PROJECT

START = """
import sys
from functa.flows.server.session import prefect_session
from prefect.server.api.server import SubprocessASGIServer
with prefect_session():
    print(SubprocessASGIServer().server_process.pid, flush=True)
    sys.stdin.readline()
"""

WATCH = """
import subprocess, sys
from functa.flows.server.embedded import end_with_this_process
child = subprocess.Popen(["sleep", "600"])
end_with_this_process(child.pid)
print(child.pid, flush=True)
sys.stdin.readline()
"""


def killed(script: str, environment: dict[str, str]) -> psutil.Process:
    """Run the script until it prints a process's id; kill it, and return that process."""
    starter = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    process = psutil.Process(int(starter.stdout.readline()))
    assert process.is_running()
    starter.kill()
    starter.wait()
    starter.stdin.close()
    starter.stdout.close()
    return process


def test_a_process_ends_with_the_one_that_was_killed_beside_it() -> None:
    psutil.wait_procs([process := killed(WATCH, dict(os.environ))], timeout=20)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.server
@pytest.mark.slow
def test_the_server_of_a_killed_command_ends_by_itself(tmp_path: Path) -> None:
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    psutil.wait_procs([server := killed(START, apart | {"PREFECT_HOME": str(tmp_path)})], timeout=60)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
