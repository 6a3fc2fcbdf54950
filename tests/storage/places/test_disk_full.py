"""A disk that fills up at any write: one line that names the path, nothing half-written, and the rerun completes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, new_store, plan, tree, write
from tests.storage.runs.test_checkpoints import assert_is, save

pytestmark = pytest.mark.faults


def full_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let fsync fail from the count-th call on: there a file system that allocates late reports that it is full."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("count", [1, 2, 4, 7, 12, 15, 18])
def test_a_shard_resumes_once_there_is_space_again(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = new_store(tmp_path / "reference")
    fill(reference, [plan(reference)])
    place = new_store(tmp_path / "s")
    each = plan(place)
    write(place, each, 0)
    with monkeypatch.context() as patch:
        full_after(patch, count)
        with pytest.raises(StorageError, match=r"fragments/.*: No space left on device; free some space") as error:
            write(place, each, 1)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))
    for shard in (1, 2):
        write(place, each, shard)
    commit(place, [each.id])
    assert tree(tmp_path / "s") == tree(tmp_path / "reference")
    assert verify(place, deep=True).bad == []
    assert len(Functaset.open(place).load("train")) == 20


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_checkpoint_that_did_not_fit_leaves_the_one_before(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        full_after(patch, count)
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            save(tmp_path, 2)
    assert_is(load_checkpoint(open_location(str(tmp_path))), 1)
    save(tmp_path, 2)
    assert_is(load_checkpoint(open_location(str(tmp_path))), 2)


def test_nothing_heavy_is_loaded_to_look_at_a_root() -> None:
    modules = ", ".join(
        f"functa.storage.{name}" for name in ("runs.checkpoints", "places.address", "functaset.commit", "config")
    )
    heavy = "{'zarr', 'torch', 'PIL', 'sklearn', 'torchvision', 'fsspec', 's3fs', 'safetensors'}"
    command = f"import sys, {modules}; sys.exit(' '.join({heavy} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_real_disk_that_fills_up_or_turns_read_only_leaves_nothing_half_visible(tmp_path: Path) -> None:
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        sys.executable,
        "-m",
        "tests.helpers.storage.full_disk",
        str(tmp_path),
    ]
    probe = subprocess.run([*command[:3], "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    full, probed, read_only, small = done.stdout.splitlines()
    for line in (full, probed):
        assert "No space left on device; free some space" in line
    assert "Read-only file system; give this user the right to it, or choose another location" in read_only
    assert "10.5 MB are needed and 1.9 MB are free" in small
    assert all(str(tmp_path / "disk" / "s") in line for line in done.stdout.splitlines())


def test_a_folder_of_somebody_else_and_a_file_in_its_place_are_named(tmp_path: Path) -> None:
    place = new_store(tmp_path / "s")
    each = plan(place)
    write(place, each, 0)
    receipts = tmp_path / "s" / each.path / "receipts"
    receipts.rename(tmp_path / "aside")
    receipts.write_text("in the way")
    with pytest.raises(StorageError, match=r"receipts/.*a file is in the way of a folder") as error:
        write(place, each, 1)
    assert "\n" not in str(error.value)
    receipts.unlink()
    (tmp_path / "aside").rename(receipts)
    receipts.chmod(0o500)
    command = [sys.executable, "-c", NOBODY, str(receipts), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    receipts.chmod(0o700)
    assert "receipts/x: Permission denied; give this user the right to it" in done.stdout
    for shard in (1, 2):
        write(place, each, shard)
    commit(place, [each.id])
    assert verify(place, deep=True).bad == []


NOBODY = """
import os, sys
from functa.storage.places.address import open_location
os.chdir(sys.argv[2])  # as root: pytest's folders are its user's alone
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    open_location(sys.argv[1]).create("x", b"")
except Exception as error:
    print(error)
"""
