"""Promises of every location: on disk, on moto's server, and on a real S3 server (make test-s3)."""

import multiprocessing
import threading
import time

import numpy as np
import pytest

from functa.storage.config import ImagesConfig
from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.records import read_vouched, vouch
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location, read_json, write_json
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import load_checkpoint, save_checkpoint
from functa.storage.upkeep.status import status
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, filled, new_store, plan, tree, write
from tests.helpers.storage.image_files import encoded, noise
from tests.helpers.storage.locations import Home, zarr_store


@pytest.fixture
def place(home: Home) -> Location:
    return open_location(str(home / "place"))


def test_what_is_written_is_read_listed_and_deleted(place: Location) -> None:
    place.preflight_write(needed_bytes=1000)
    assert place.list() == []
    assert place.create("a/b", b"first")
    assert not place.create("a/b", b"second")
    assert not place.create("a/b", b"other")  # as long as the existing one
    place.write("a/c", b"x")
    place.write("a/c", b"yy")
    assert place.read("a/b") == b"first"
    assert (place.size("a/c"), place.size("a/d")) == (2, None)
    assert place.list() == place.list("a/") == ["a/b", "a/c"]
    assert place.list("none/") == []
    assert place.child("a").read("b") == b"first"
    tokens = [entry.token for entry in place.entries()]
    place.write("a/c", b"zzz")
    assert [entry.token == token for entry, token in zip(place.entries(), tokens)] == [True, False]
    place.delete("a/c")
    place.delete("a/c")
    with pytest.raises(MissingObject, match="a/c: is missing"):
        place.read("a/c")
    with pytest.raises(MissingObject):
        place.read("a/c", limit=5)


def test_folders_are_not_objects(place: Location) -> None:
    place.write("a/b", b"x")
    assert place.entry("a") is None
    assert not place.exists("a")
    with pytest.raises(StorageError):
        place.read("a")


@pytest.mark.parametrize("size", [0, 1, 5])
def test_no_more_is_read_than_the_limit(place: Location, size: int) -> None:
    data = b"x" * size
    place.write("k", data)
    assert place.read("k") == place.read("k", limit=size) == place.read("k", limit=9) == data
    assert read_vouched(place, "k", vouch(data)) == data
    for wrong, fault in ((vouch(data + b"y"), f"has {size} bytes and should have {size + 1}"), (vouch(b""), "bytes")):
        if wrong.bytes != size:
            with pytest.raises(DamagedObject, match=fault):
                read_vouched(place, "k", wrong)
    if size:
        with pytest.raises(DamagedObject, match=f"has more than {size - 1} bytes"):
            place.read("k", limit=size - 1)


def test_json_is_read_back_and_what_is_too_large_is_refused(place: Location) -> None:
    write_json(place, "a.json", {"b": [1, 2.5, None]})
    assert read_json(place, "a.json") == {"b": [1, 2.5, None]}
    with pytest.raises(DamagedObject, match="has more than 3 bytes"):
        read_json(place, "a.json", limit=3)


def test_many_objects_are_listed_whole(place: Location) -> None:
    """S3 lists a thousand at a time."""
    keys = [f"x/{i:04d}" for i in range(1003)]
    threads = [threading.Thread(target=lambda k=k: [place.write(key, b"") for key in keys[k::4]]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.list() == list(place.listing().keys) == keys
    assert place.list("x/010") == keys[100:110]


def test_an_empty_place_is_no_functaset(place: Location) -> None:
    for act in (lambda: Functaset.open(place), lambda: verify(place)):
        with pytest.raises(StorageError, match="no functaset there"):
            act()


def test_of_two_processes_that_create_the_same_objects_each_is_made_by_one(place: Location) -> None:
    """Each object has the bytes of the process whose call returned True, and no object is made by both."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        made = pool.starmap(_create_all, [(place, b"one"), (place, b"two")])
    for i in range(RACES):
        assert made[0][i] != made[1][i], "each made by one"
        assert place.read(f"k{i}") == (b"one" if made[0][i] else b"two")


RACES = 40


def _create_all(place: Location, data: bytes) -> list[bool]:
    """Waits for the other at every object, by an object."""
    made = []
    other = {b"one": b"two", b"two": b"one"}[data].decode()
    for i in range(RACES):
        place.create(f"ready-{i}-{data.decode()}", b"")
        deadline = time.monotonic() + 30
        while not place.exists(f"ready-{i}-{other}"):
            assert time.monotonic() < deadline, "the other one ended"
        made.append(place.create(f"k{i}", data))
    return made


@pytest.mark.faults
def test_two_processes_that_write_one_fragment_end_with_the_bytes_of_one(home: Home) -> None:
    reference = new_store(home / "reference")
    fill(reference, [plan(reference)])
    place = new_store(home / "s")
    each = plan(place)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_write_all, [(place, n) for n in range(2)])
    commit(place, [each.id])
    assert tree(home / "s") == tree(home / "reference")
    assert verify(place, deep=True).bad == []


def _write_all(place: Location, turn: int) -> None:
    each = plan(place)
    for shard in list(range(each.shards))[:: 1 if turn else -1]:
        write(place, each, shard)


def test_two_committers_of_other_rows_end_both_visible_and_of_the_same_rows_never(home: Home) -> None:
    place = new_store(home / "s")
    plans = [plan(place, n=4, first=first) for first in (0, 4, 2)]
    for each in plans:
        write(place, each, 0)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(_commit, [(place, each.id) for each in plans])
    keys = Functaset.open(place).load("train").keys
    assert len(keys) == len(set(keys)) in (4, 8)
    assert verify(place, deep=True).bad == []


def _commit(place: Location, fragment: str) -> None:
    try:
        commit(place, [fragment])
    except StorageError as error:
        if "visible already" not in str(error):
            raise


def test_an_altered_object_is_named(home: Home) -> None:
    place = filled(home / "s")
    assert status(place)["left"] == 0
    fragment = Functaset.open(place).fragments[0].id
    key = f"fragments/{fragment}/z/c/1/0/0/0"
    for damage in (b"garbage", b"", bytes(place.size(key) or 0)):
        place.write(key, damage)
        assert [bad["path"] for bad in verify(place, deep=True).bad] == [key]
        with pytest.raises(StorageError, match=key):
            Functaset.open(place).load("train")
    place.delete(key)
    with pytest.raises(StorageError, match=f"{key}: is missing"):
        Functaset.open(place).load("train")


def test_zarr_opens_the_store_by_itself(home: Home) -> None:
    import zarr

    place = filled(home / "zarr")
    fragment = Functaset.open(place).fragments[0].id
    group = zarr.open_group(zarr_store(place), mode="r", zarr_format=3)
    codes = np.asarray(group[f"fragments/{fragment}/z"][:])
    np.testing.assert_array_equal(codes, Functaset.open(place).load("train").codes)


def test_checkpoints_and_image_folders_lie_there_too(home: Home) -> None:
    from PIL import Image

    place = open_location(str(home / "run"))
    for step in (1, 2, 3):
        save_checkpoint(place.child("checkpoints"), step, {"w": np.arange(step)}, {})
    found = load_checkpoint(place.child("checkpoints"))
    assert found is not None
    assert found.step == 3
    for i in range(4):
        place.write(f"images/cat/{i}.png", encoded(Image.fromarray(noise(i))))
    images = open_images(ImagesConfig(source="folder", location=f"{home}/run/images"))
    batch = images.split("train").read(range(len(images.split("train"))))
    assert batch.good.all()
    assert len(batch.good) == 3
