import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint, newest_metadata, save_checkpoint


def tensors(step: int) -> dict[str, np.ndarray]:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4).T + step  # not contiguous, which safetensors garbles
    return {"turned": turned, "scalar": np.array(step, np.int64), "empty": np.zeros((0, 3), np.float32)}


def assert_is(checkpoint: object, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step  # type: ignore[attr-defined]
    assert checkpoint.metadata == {"step": step, "name": "é"}  # type: ignore[attr-defined]
    for name, value in tensors(step).items():
        np.testing.assert_array_equal(checkpoint.tensors[name], value, strict=True)  # type: ignore[attr-defined]


def save(path: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(open_location(str(path)), step, tensors(step), {"step": step, "name": "é"}, keep)


def test_the_newest_is_loaded_and_older_ones_are_pruned(tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    assert load_checkpoint(place) is None
    assert newest_metadata(place) is None
    for step in (1, 20, 300):
        save(tmp_path, step)
    assert_is(load_checkpoint(place), 300)
    assert_is(load_checkpoint(place, 20), 20)
    assert load_checkpoint(place, 1) is None
    assert newest_metadata(place) == {"step": 300, "name": "é"}
    names = [f"step-{step:08d}.{ending}" for step in (20, 300) for ending in ("json", "safetensors")]
    assert place.list() == names


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": ("safetensors", flip),
    "truncated": ("safetensors", lambda p: p.write_bytes(p.read_bytes()[:-5])),
    "emptied": ("safetensors", lambda p: p.write_bytes(b"")),
    "tensors missing": ("safetensors", Path.unlink),
    "marker garbled": ("json", lambda p: p.write_bytes(b"{")),
    "marker of another shape": ("json", lambda p: p.write_bytes(b'{"step": 2}')),
    "marker of another step": ("json", lambda p: p.write_bytes(p.with_name("step-00000001.json").read_bytes())),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    ending, act = DAMAGE[damage]
    act(tmp_path / f"step-00000002.{ending}")
    with caplog.at_level(logging.WARNING):
        assert_is(load_checkpoint(open_location(str(tmp_path))), 1)
    assert "step-00000002" in caplog.text
    with pytest.raises(StorageError, match="step-00000002"):
        load_checkpoint(open_location(str(tmp_path)), 2)


def test_a_damaged_newest_is_not_what_pruning_keeps(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002.safetensors").unlink()
    save(tmp_path, 3)
    assert_is(load_checkpoint(open_location(str(tmp_path)), 1), 1)


def test_tensors_without_a_marker_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000002.json").unlink()
    assert newest_metadata(open_location(str(tmp_path))) == {"step": 1, "name": "é"}
    assert_is(load_checkpoint(open_location(str(tmp_path))), 1)


@pytest.mark.faults
def test_a_writer_killed_at_any_point_leaves_a_whole_checkpoint_and_can_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.storage.killed_writer", "checkpoint", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 12  # points at which it was killed
