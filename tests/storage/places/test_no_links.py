"""Places without hard links, such as exFAT: create-only holds there too, or is refused in words."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from functa.flows.server.doctor import check_disk
from functa.storage.errors import StorageError
from functa.storage.places import placing
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from tests.helpers.storage.functasets import filled, tree

pytestmark = pytest.mark.faults

MISSING = [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES, errno.EXDEV]


def missing(number: int) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def without(patch: pytest.MonkeyPatch, ways: str, number: int = errno.EPERM) -> None:
    """Take away "links", "links and renames", or "all" ways to name a file unless the name is taken."""
    patch.setattr(os, "link", missing(number))
    if ways != "links":
        patch.setattr(placing, "_rename_new", missing(number))
    if ways == "all":
        patch.setattr(fcntl, "flock", missing(number))


@pytest.fixture(params=["links", "links and renames"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    without(monkeypatch, request.param)
    return str(request.param)


@pytest.mark.parametrize("number", MISSING)
@pytest.mark.parametrize("lacking", ["links", "links and renames"])
def test_a_name_that_is_taken_stays_as_it_is_without_hard_links(
    lacking: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, lacking, number)
    place = open_location(str(tmp_path))
    assert place.create("a/b", b"first")
    assert not place.create("a/b", b"second")
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as for one who looked before the other wrote
    assert not place.create("a/b", b"third")
    assert place.read("a/b") == b"first"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_functaset_without_hard_links_has_the_same_bytes(ways: str, tmp_path: Path) -> None:
    filled(tmp_path / "s")
    reference = multiprocessing.get_context("spawn").Process(target=filled, args=(str(tmp_path / "reference"),))
    reference.start()
    reference.join()
    assert tree(tmp_path / "s") == tree(tmp_path / "reference") != {}


RACES, WRITERS, SIZE = 60, 4, 1 << 16


def race(place: Location, ways: str, writer: int) -> list[bool]:
    """Create every object at about the same moment as the others."""
    with pytest.MonkeyPatch.context() as patch:
        without(patch, ways)
        made = []
        for i in range(RACES):
            place.write(f"ready/{i}-{writer}", b"")
            deadline = time.monotonic() + 60
            while len(place.list(f"ready/{i}-")) < WRITERS and not place.exists(f"races/{i}"):
                assert time.monotonic() < deadline, "the others ended"
            made.append(place.create(f"races/{i}", bytes([writer]) * SIZE))
            assert len(place.read(f"races/{i}")) == SIZE, "a torn object was seen"
        return made


@pytest.mark.parametrize("lacking", ["links", "links and renames"])
def test_of_racing_processes_without_hard_links_one_makes_each_object_and_nobody_sees_a_part(
    lacking: str, tmp_path: Path
) -> None:
    place = open_location(str(tmp_path))
    with multiprocessing.get_context("spawn").Pool(WRITERS) as pool:
        made = pool.starmap(race, [(place, lacking, writer) for writer in range(WRITERS)])
    for i in range(RACES):
        (winner,) = [writer for writer in range(WRITERS) if made[writer][i]]
        assert place.read(f"races/{i}") == bytes([winner]) * SIZE
    assert place.leftovers() == []


def test_a_writer_killed_in_its_turn_holds_nobody_up(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.link = missing(errno.EPERM)
        placing._rename_new = missing(errno.EINVAL)
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        open_location(str(tmp_path)).create("k", b"never seen")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    place = open_location(str(tmp_path))
    assert place.list() == []
    with pytest.MonkeyPatch.context() as patch:
        without(patch, "links and renames")
        assert place.create("k", b"whole")
    assert place.read("k") == b"whole"


def test_a_link_whose_answer_was_lost_and_that_was_asked_for_again_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system's client may send the request twice, and the second answer is that the name is taken."""
    link = os.link

    def twice(source: Path, name: Path) -> None:
        link(source, name)
        link(source, name)

    monkeypatch.setattr(os, "link", twice)
    assert open_location(str(tmp_path)).create("k", b"mine")
    assert not open_location(str(tmp_path)).create("k", b"another's")


def test_a_place_with_no_way_at_all_is_named_by_preflight_and_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "all")
    words = r"this file system has neither hard links, .* nor locks, .*; choose a location on another file system"
    with pytest.raises(StorageError, match=f"cannot write to {tmp_path}: {words}") as error:
        open_location(str(tmp_path)).preflight_write()
    assert "\n" not in str(error.value)
    check = check_disk(str(tmp_path / "root"))
    assert (check.ok, "neither hard links" in check.detail) == (False, True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if not os.path.isfile(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert open_location(str(tmp_path)).create("a/b", b"x")


def test_doctor_names_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", missing(errno.EROFS))
    check = check_disk(str(tmp_path))
    assert check.ok is False
    assert "Read-only file system; give this user the right to it" in check.detail
