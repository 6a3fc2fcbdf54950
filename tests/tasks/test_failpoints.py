"""Storage operations of an encoding, a training, a re-encoding and a collection fail, one at a time, in five ways.

Every third does in `make test-faults`, each with FUNCTA_EVERY=1.

Whatever fails, the work that is done again ends with the bytes of an undisturbed run, file for file; readers see all of
a version or all of the one before. Nothing is left out of the comparison but temporary files, older checkpoints, and,
of collections, the numbers of commits.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.storage.failpoints import ACTIONS

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[2]
WORK = ("encode", "re-encode", "train", "gc", "erase")
EVERY = int(os.environ.get("FUNCTA_EVERY", "3"))
LEAST = {"encode": 60, "re-encode": 30, "train": 12, "gc": 40, "erase": 60}  # changes

Record = Callable[[str, object], None]


def fail(work: str, folder: Path, every: int, record: Record, timeout: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.helpers.tasks.failing_work", work, str(folder), str(every)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    counts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["action"] for each in counts] == list(ACTIONS)
    print(done.stdout)
    record(f"failpoints of {work}", counts)
    return counts


@pytest.mark.parametrize("work", WORK)
@pytest.mark.timeout(280)
def test_work_that_failed_at_some_of_its_operations_ends_with_the_bytes_of_an_undisturbed_run(
    work: str, tmp_path: Path, record_property: Record
) -> None:
    for counts in fail(work, tmp_path / "w", 61, record_property, 270):
        assert counts["tries"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
@pytest.mark.timeout(2400)
def test_work_that_failed_at_any_of_its_operations_ends_with_the_bytes_of_an_undisturbed_run(
    work: str, tmp_path: Path, record_property: Record
) -> None:
    for counts in fail(work, tmp_path / "w", EVERY, record_property, 2300):
        assert counts["tries"] >= counts["operations"] // EVERY
        assert counts["operations"] >= LEAST[work] or counts["action"] in ("full", "short")
        ended = {"kill": "killed", "raise": "failed", "lost": "failed"}.get(counts["action"])
        assert ended is None or counts[ended] > 0
