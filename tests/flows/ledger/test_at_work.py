"""One process at a time works at a stage of a root."""

import subprocess
import sys
from pathlib import Path

import pytest

from functa.storage.errors import StorageError
from tests.helpers.flows.finished_stages import finish, ledger

PROJECT = Path(__file__).parents[3]


def test_two_processes_do_not_work_at_one_stage(tmp_path: Path) -> None:
    code = (
        "import sys, time; from functa.flows.config.load import load_config; from functa.flows.ledger import Ledger\n"
        "with Ledger(load_config('digits'), sys.argv[1]).working('meta_train'):\n"
        "    print('at work', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout
    assert other.stdout.readline() == "at work\n"
    with (
        pytest.raises(StorageError, match=f"process {other.pid} is at meta-train"),
        ledger(tmp_path).working("meta_train"),
    ):
        pass
    other.kill()
    other.wait()
    finish(ledger(tmp_path), "meta_train")  # a killed one is in nobody's way


BEGIN = """
import sys, time
from functa.flows.config.load import load_config
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
ledger = Ledger(load_config("digits"), sys.argv[1])
print("ready", flush=True)
input()
try:
    with ledger.working("meta_train"):
        print("entered", flush=True)
        input()
except StorageError as error:
    print(error, flush=True)
"""


@pytest.mark.faults
def test_of_commands_that_begin_a_stage_at_the_same_moment_one_enters(tmp_path: Path) -> None:
    several = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(tmp_path)],
            cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    assert {process.stdout.readline() for process in several if process.stdout} == {"ready\n"}
    for process in several:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in several if process.stdout]
    for process in several:
        process.communicate("\n")
    assert answers.count("entered\n") == 1
    assert sum("is at meta-train there since" in answer for answer in answers) == 3
