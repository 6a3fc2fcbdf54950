"""A writer that is stopped (SIGSTOP), replaced, and wakes late: what the other one has committed keeps every byte."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from functa.storage.functaset.commit import commit
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import new_store, plan, tree, write

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parents[3]
LATE = """
import sys
import numpy as np
from functa.storage.places.address import open_location
from tests.helpers.storage.functasets import latents_of, plan, table_of, write
place = open_location(sys.argv[1])
each = plan(place)
print("planned", flush=True)
for shard in range(each.shards):
    shifted = latents_of(table_of(place, each, shard).keys) + np.float32(0.1)  # other values: a swap would be seen
    write(place, each, shard, latents=shifted, max_clip_fraction=1.0)
    print(shard, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_writer_that_wakes_after_another_has_committed_changes_no_byte(lines: int, tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-c", LATE, place.uri], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as late:
        assert late.stdout
        for _ in range(lines):
            assert late.stdout.readline()
        late.send_signal(signal.SIGSTOP)
        each = plan(place)
        for shard in range(each.shards):
            write(place, each, shard)
        commit(place, [each.id])
        before = tree(tmp_path / "s")
        late.send_signal(signal.SIGCONT)
        assert late.wait(60) == 0
    assert tree(tmp_path / "s") == before
    assert not list(tmp_path.rglob("*.partial"))
    assert verify(place, deep=True).bad == []
