import errno
import os
import threading
from pathlib import Path

import pytest

from functa.storage.errors import MissingObject, StorageError, TransientError
from functa.storage.places.address import open_location, read_json, write_json


def test_what_is_written_is_read_and_listed_without_temporary_files(tmp_path: Path) -> None:
    place = open_location(str(tmp_path / "a" / "b"))
    place.write("x/y.bin", b"one")
    place.write("x/y.bin", b"two")
    (tmp_path / "a" / "b" / "x" / ".z.1234.partial").write_bytes(b"of a killed writer")
    assert place.read("x/y.bin") == b"two"
    assert place.list() == ["x/y.bin"]
    assert place.list("x/") == ["x/y.bin"]
    assert place.list("x/z") == []
    assert place.size("x/y.bin") == 3
    assert place.size("x/none") is None
    assert place.child("x").read("y.bin") == b"two"
    place.delete("x/y.bin")
    place.delete("x/y.bin")
    assert not place.exists("x/y.bin")
    with pytest.raises(MissingObject, match="is missing"):
        place.read("x/y.bin")


def test_create_never_replaces(tmp_path: Path) -> None:
    place = open_location(f"file://{tmp_path}")
    assert place.create("k", b"first")
    assert not place.create("k", b"second")
    assert place.read("k") == b"first"
    assert os.listdir(tmp_path) == ["k"]


def test_of_many_creators_exactly_one_wins(tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    barrier, wins = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        wins.append((place.create("k", bytes([number]) * 1000), number))

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for won, number in wins if won]
    assert place.read("k") == bytes([winner]) * 1000


@pytest.mark.attacks
@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a//b", "a/../../x", "", ".", "a\0b"])
def test_keys_that_lead_out_are_refused(tmp_path: Path, key: str) -> None:
    place = open_location(str(tmp_path))
    for act in (place.read, place.delete, place.size, lambda k: place.write(k, b""), lambda k: place.create(k, b"")):
        with pytest.raises(StorageError, match="not a relative key"):
            act(key)


@pytest.mark.attacks
def test_a_link_in_a_store_does_not_aim_writes_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "store" / "fragments").symlink_to(tmp_path / "victim")
    place = open_location(str(tmp_path / "store"))
    with pytest.raises(StorageError, match="symbolic link leads out"):
        place.create("fragments/x", b"")
    assert list((tmp_path / "victim").iterdir()) == []


@pytest.mark.attacks
@pytest.mark.parametrize(
    "uri", ["http://169.254.169.254/x", "pipe://ls", "memory://a", "", "file://relative", "s3://", "s3://k:secret@b/x"]
)
def test_other_kinds_of_places_are_refused_in_one_line_without_secrets(uri: str) -> None:
    with pytest.raises(StorageError) as error:
        open_location(uri)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_preflight_reports_the_fault_in_one_line(tmp_path: Path) -> None:
    place = open_location(str(tmp_path / "new" / "root"))
    place.preflight_write()
    assert place.list() == []
    (tmp_path / "file").write_text("in the way")
    for uri in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/functa", "/sys/functa"):
        with pytest.raises(StorageError) as error:
            open_location(uri).preflight_write()
        assert uri in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="are needed and"):
        place.preflight_write(needed_bytes=1 << 60)


@pytest.mark.parametrize("prefix", ["commits", "commits/", "comm", "commits/0", "fragments/a", "commits/1/2", "none"])
def test_a_listing_enters_no_folder_that_its_prefix_rules_out(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_location(str(tmp_path))
    keys = ["commits/01", "commits/02", "commits2/a", "fragments/a/b", "fragments/ab", "fragments/c/d", "z"]
    for key in keys:
        place.write(key, b"")
    entered, opened = list[str](), os.open

    def open_folder(path: str, flags: int, *rest: int, **options: int) -> int:
        entered.extend([str(path)] if flags & os.O_DIRECTORY else [])
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", open_folder)
    assert place.list(prefix) == [key for key in keys if key.startswith(prefix)]
    below = [str(Path(folder).relative_to(tmp_path)) for folder in entered if Path(folder) != tmp_path]
    assert all(f"{folder}/".startswith(prefix) or prefix.startswith(f"{folder}/") for folder in below)


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
def test_a_file_system_that_went_away_may_come_back(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_location(str(tmp_path))
    place.write("k", b"x")

    def fails(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("functa.storage.places.local._open_at_once", fails)
    with pytest.raises(TransientError, match="k: "):
        place.read("k")
    number = errno.EACCES
    with pytest.raises(StorageError) as error:
        place.read("k")
    assert not isinstance(error.value, TransientError)


def test_json_is_read_back_and_what_is_none_or_too_large_is_refused(tmp_path: Path) -> None:
    place = open_location(str(tmp_path))
    write_json(place, "a.json", {"b": [1, 2.5, None]})
    assert read_json(place, "a.json") == {"b": [1, 2.5, None]}
    place.write("b.json", b"[" * 100_000)
    place.write("c.json", b"{\xff")
    for key in ("b.json", "c.json"):
        with pytest.raises(StorageError, match="not valid JSON"):
            read_json(place, key)
    with pytest.raises(StorageError, match="has more than 3 bytes"):
        read_json(place, "a.json", limit=3)
    with pytest.raises(ValueError, match="JSON"):
        write_json(place, "d.json", float("nan"))
