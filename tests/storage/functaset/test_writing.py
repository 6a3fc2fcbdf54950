"""Writers of one shard, killed or late: what the next one finds is whole, and a finished shard keeps its bytes."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.places.local import LocalLocation
from tests.helpers.storage.functasets import latents_of, new_store, plan, table_of, tree, write


@pytest.mark.faults
@pytest.mark.slow
def test_a_writer_killed_at_many_points_leaves_nothing_that_the_next_one_trusts_wrongly(tmp_path: Path) -> None:
    """Each time, the next writer ends with the bytes of an uninterrupted run. Every point: ... killed store DIR 1."""
    command = [sys.executable, "-m", "tests.helpers.storage.killed_writer", "store", str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 30


@pytest.mark.slow
@pytest.mark.faults
def test_four_writers_of_one_fragment_killed_again_and_again_end_with_an_uninterrupted_runs_bytes(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.helpers.storage.crowd", str(tmp_path), "50", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 50


@dataclass(frozen=True)
class Sleeper(LocalLocation):
    """Sleeps before its first object is put, while another writes the whole shard."""

    wake: Callable[[], None] = lambda: None
    slept: list[bool] = field(default_factory=list)

    def create(self, key: str, data: bytes) -> bool:
        if "/c/" in key and not self.slept:
            self.slept.append(True)
            self.wake()
        return super().create(key, data)


def test_a_late_writer_that_wakes_after_its_shard_was_done_by_another_changes_no_byte(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    each = plan(place)
    done: list[Any] = []

    def another() -> None:
        done.append(write(place, each, 1))
        done.append(tree(tmp_path / "s"))

    shifted = latents_of(table_of(place, each, 1).keys) + np.float32(0.1)
    receipt = write(Sleeper(place.uri, another), each, 1, latents=shifted)
    assert receipt == done[0]
    assert tree(tmp_path / "s") == done[1]
