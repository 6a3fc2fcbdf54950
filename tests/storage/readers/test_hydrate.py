"""Hydration: raw files beside records; what is damaged, interrupted or too large is found."""

import contextlib
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.readers import hydrate as hydrating
from functa.storage.readers.hydrate import hydrate
from functa.storage.readers.open import open_reader
from functa.storage.readers.order import Order
from functa.storage.readers.reader import Indexed
from tests.helpers.storage.functasets import damage, filled


@pytest.mark.parametrize("how", ["missing", "short", "flipped"])
@pytest.mark.parametrize("array", ["z.raw", "label.raw", "id.raw", "000001.json"])
def test_damage_to_hydrated_files_is_named_and_repaired_by_hydrating_again(
    tmp_path: Path, cache_folder: Path, array: str, how: str
) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    hydrate(functaset)
    fragment = functaset.fragments[0].id
    (path,) = cache_folder.glob(f"{fragment}-*/{array}")
    damage(path, how)
    with pytest.raises(StorageError, match="run `functa store hydrate`") as error:
        list(open_reader(functaset, "train", "mapped").batches(Order(7)))
    if (array, how) != ("000001.json", "missing"):
        assert array in str(error.value)
    again = hydrate(functaset)
    assert 1 <= again.written <= 3
    assert len(open_reader(functaset, "train", "mapped")) == 20


def test_hydrating_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    real, begun = hydrating._write, list[Any]()
    monkeypatch.setattr(hydrating, "THREADS", 1)

    def stops(*arguments: Any) -> None:
        begun.append(arguments)
        if len(begun) >= 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(hydrating, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        hydrate(functaset)
    with pytest.raises(StorageError, match="run `functa store hydrate`"):
        open_reader(functaset, "test", "mapped")
    monkeypatch.setattr(hydrating, "_write", real)
    done = hydrate(functaset)
    assert (done.shards, done.written) == (4, 2)
    assert hydrate(functaset).written == 0


def test_hydrating_without_space_writes_nothing_and_names_the_fault(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    monkeypatch.setattr("functa.storage.places.local.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(StorageError, match="0 MB are free; free some space or choose another location"):
        hydrate(functaset)
    assert not list(cache_folder.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--to"):
        hydrate(functaset, str(tmp_path / "file"))


@pytest.mark.faults
def test_a_disk_that_is_full_while_hydrating_is_one_line_and_what_is_whole_stays(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    real, left = os.pwrite, [7]  # writes: of two shards, and one of the third

    def full(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(hydrating, "THREADS", 1)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"^[^\n]*: No space left on device; free some space or [^\n]*$") as error:
        hydrate(functaset)
    assert str(cache_folder) in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder.parents[1]))
    assert hydrate(functaset).written == 2


def test_only_the_split_that_is_asked_for_is_hydrated_into_the_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    monkeypatch.setenv(hydrating.FOLDER, str(tmp_path / "scratch"))
    assert hydrate(functaset, split="train").shards == 3
    assert len(open_reader(functaset, "train", "mapped")) == 20
    with pytest.raises(StorageError, match="run `functa store hydrate`"):
        open_reader(functaset, "test", "mapped")


def test_a_mapped_shard_is_checked_when_it_is_read_and_not_before(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functaset = Functaset.open(filled(tmp_path / "s"))
    hydrate(functaset)
    hashed: list[int] = []
    real = hydrating.sha256_of
    monkeypatch.setattr(hydrating, "sha256_of", lambda rows: (hashed.append(rows.nbytes), real(rows))[1])
    reader = open_reader(functaset, "train", "mapped")
    assert isinstance(reader, Indexed)
    row = np.prod(reader.latent_shape)
    assert sum(hashed) == 20 * (4 + 16)  # labels and ids
    for _ in range(2):
        reader.read(np.array([9, 10, 15]))
    assert sum(hashed) == 20 * (4 + 16) + 8 * row  # of the second shard, once


def test_the_command_hydrates_and_prints_the_result(tmp_path: Path) -> None:
    from functa.flows.cli.main import app

    uri, folder = filled(tmp_path / "s").uri, tmp_path / "raw"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = ["store", "hydrate", uri, "--to", str(folder), "--json"]
        assert app(arguments, exit_on_error=False, result_action="return_value") == 0
    assert json.loads(printed.getvalue()) == {
        "folder": str(folder),
        "shards": 4,
        "written": 4,
        "bytes": 26 * (32 + 4 + 16),
    }
    assert len(open_reader(Functaset.open(uri), "test", "mapped", hydrated=str(folder))) == 6
