"""A run goes on when the process that read its output has ended."""

import os
import subprocess
import sys

from tests.helpers.flows.prefect_server import PROJECT

RUN = """
import logging, sys, time
from prefect.logging.configuration import setup_logging
setup_logging()
from functa.flows.server.worker import outlive_the_worker
if sys.argv[1] == "outlives":
    outlive_the_worker()
log = logging.getLogger("prefect.tests")
log.info("first")
sys.stdin.readline()  # by now the reader of this output has ended
for number in range(3):
    log.info("nobody reads this")
    print("nor this", flush=True)
    print("nor this", file=sys.stderr, flush=True)
open(sys.argv[2], "w").write("done")
"""


QUIET = {"PREFECT_LOGGING_TO_API_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "INFO"}


def run(how: str, done: str) -> int:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, how, done],
        cwd=PROJECT,
        env=os.environ | QUIET,
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    assert b"first" in os.read(reading, 65536)
    os.close(reading)
    process.communicate(b"\n", timeout=60)
    return process.returncode


def test_a_run_goes_on_when_its_worker_has_ended(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run("outlives", str(tmp_path / "a")) == 0
    assert (tmp_path / "a").read_text() == "done"
    assert run("as it is", str(tmp_path / "b")) != 0  # else the fix is not needed any more
