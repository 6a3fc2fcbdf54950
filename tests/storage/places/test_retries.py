"""S3 over a bad network: a relay before the server loses requests and answers; every returned result stays true."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from functa.storage.config import ImagesConfig
from functa.storage.errors import MissingObject, StorageError, TransientError
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.records import read_vouched, vouch
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.places.s3 import S3Location
from functa.storage.places.s3_retries import LONGEST_PAUSE, PATIENCE_SECONDS, TRIES
from functa.storage.runs.checkpoints import load_checkpoint, save_checkpoint
from tests.helpers.storage.functasets import filled
from tests.helpers.storage.image_files import encoded, noise
from tests.helpers.storage.image_shards import as_folders, as_tables, as_tars
from tests.helpers.storage.locations import new_bucket
from tests.helpers.storage.relay import Relay
from tests.helpers.storage.s3_servers import SERVERS, server_environment


@pytest.fixture(params=SERVERS)
def relay(request: pytest.FixtureRequest) -> Iterator[Relay]:
    """Before either server."""
    environment = server_environment(request)
    host, port = environment["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    relay = Relay((host, int(port)))
    with new_bucket(environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}"}) as name:
        relay.bucket = name
        yield relay
    relay.close()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def place(relay: Relay, pauses: list[float]) -> S3Location:
    """A location whose pauses are recorded, not slept."""
    found = open_location(f"s3://{relay.bucket}/x")
    assert isinstance(found, S3Location)
    relay.requests.clear()
    return replace(found, sleep=pauses.append)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["busy", "cut", "deaf"])
def test_reads_and_writes_survive_what_passes(relay: Relay, place: S3Location, pauses: list[float], kind: str) -> None:
    relay.faults += [(method, kind) for method in (b"PUT", b"GET", b"HEAD", b"DELETE", b"POST")] * 2
    place.write("a", b"one")
    assert place.read("a") == b"one"
    assert place.size("a") == 3
    assert place.list() == ["a"]
    place.delete("a")
    assert place.size("a") is None
    assert relay.faults == [(b"POST", kind)] * 2
    assert pauses
    assert max(pauses) <= LONGEST_PAUSE


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["busy", "cut", "deaf"])
def test_a_created_object_whose_answer_was_lost_is_ours(relay: Relay, place: S3Location, kind: str, count: int) -> None:
    """It does not matter whether we repeat the request or aiohttp itself does, which it does not report."""
    relay.faults += [(b"PUT", kind)] * count
    assert place.create("a", b"mine")
    assert relay.requests.count(b"PUT") == count + 1
    assert place.read("a") == b"mine"


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["busy", "cut", "deaf"])
def test_an_object_of_somebody_else_is_not_ours_whatever_was_lost(relay: Relay, place: S3Location, kind: str) -> None:
    assert place.create("a", b"theirs")
    relay.faults.append((b"PUT", kind))
    assert not place.create("a", b"mine")
    assert not place.create("a", b"mine and longer")
    assert place.read("a") == b"theirs"


def test_retries_end_with_one_line_and_a_transient_error(relay: Relay, place: S3Location, pauses: list[float]) -> None:
    relay.faults += [(b"PUT", "busy")] * 20
    with pytest.raises(TransientError, match=r"/a: ") as error:
        place.create("a", b"x")
    assert "\n" not in str(error.value)
    assert relay.requests.count(b"PUT") == TRIES
    assert len(pauses) == TRIES - 1
    assert 20 < sum(pauses) < PATIENCE_SECONDS
    for turn, pause in enumerate(pauses):
        assert 0.5 <= pause / min(LONGEST_PAUSE, 2.0**turn) <= 1
    assert len(set(pauses)) == len(pauses)


def test_what_will_not_pass_is_not_tried_again(relay: Relay, place: S3Location, pauses: list[float]) -> None:
    with pytest.raises(MissingObject):
        place.read("none")
    with pytest.raises(StorageError) as error:
        replace(place, uri="s3://no-such-bucket/x").write("a", b"x")
    assert not isinstance(error.value, TransientError)
    assert pauses == []


def test_a_lost_connection_makes_no_image_bad_and_sets_no_checkpoint_back(relay: Relay, place: S3Location) -> None:
    from PIL import Image

    for i in range(4):
        place.write(f"images/cat/{i}.png", encoded(Image.fromarray(noise(i))))
    for step in (1, 2):
        save_checkpoint(place.child("c"), step, {}, {})
    images = open_images(ImagesConfig(source="folder", location=place.child("images").uri)).split("train")
    hasty = replace(place, tries=1)
    relay.faults += [(b"GET", "busy")]
    with pytest.raises(TransientError):
        load_checkpoint(hasty.child("c"))
    relay.faults[:] = [(b"GET", "busy")] * TRIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("functa.storage.places.s3_retries.LONGEST_PAUSE", 0.0)
        with pytest.raises(TransientError):
            images.read_row(0)
    relay.faults.clear()
    assert images.read(range(len(images))).good.all()


@pytest.mark.parametrize("source", ["folder", "webdataset", "parquet"])
def test_images_are_read_by_one_request_each(
    relay: Relay, place: S3Location, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a table are read by groups."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    {"folder": as_folders, "webdataset": as_tars, "parquet": as_tables}[source](tmp_path / "d")
    for file in sorted(file for file in (tmp_path / "d").rglob("*") if file.is_file()):
        place.write(f"d/{file.relative_to(tmp_path / 'd')}", file.read_bytes())
    images = open_images(ImagesConfig(source=source, location=place.child("d").uri))
    for split in images.splits.values():
        split.read(range(len(split)))
        relay.requests.clear()
        assert split.read(range(len(split))).good.all()
        assert len(relay.requests) == (0 if source == "parquet" else len(split))
        assert set(relay.requests) <= {b"GET"}


@pytest.mark.faults
def test_a_lost_connection_makes_no_image_of_a_table_bad(relay: Relay, place: S3Location, tmp_path: Path) -> None:
    as_tables(tmp_path / "d")
    for file in sorted((tmp_path / "d").iterdir()):
        place.write(f"d/{file.name}", file.read_bytes())
    images = open_images(ImagesConfig(source="parquet", location=place.child("d").uri)).split("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("functa.storage.places.s3_retries.LONGEST_PAUSE", 0.0)
        for method in (b"HEAD", b"GET"):
            relay.faults[:] = [(method, "busy")] * TRIES
            with pytest.raises(TransientError):
                images.read_row(len(images) - 1)  # the first group of rows has been read
    relay.faults.clear()
    assert images.read(range(len(images))).good.all()


def test_an_operation_is_one_request(relay: Relay, place: S3Location) -> None:
    def requests(act: Callable[[], object]) -> list[bytes]:
        relay.requests.clear()
        act()
        return list(relay.requests)

    assert requests(lambda: place.create("a", b"x")) == [b"PUT"]
    assert requests(lambda: place.write("a", b"x")) == [b"PUT"]
    assert requests(lambda: place.read("a")) == [b"GET"]
    assert requests(lambda: place.read("a", limit=5)) == [b"GET"]
    assert requests(lambda: place.versioned("a")) == requests(lambda: place.versioned("none")) == [b"GET"]
    assert requests(lambda: place.versioned_part("a", 0, 1)) == [b"GET"]
    assert requests(lambda: read_vouched(place, "a", vouch(b"x"))) == [b"GET"]
    assert requests(lambda: place.entry("a")) == requests(lambda: place.entry("none")) == [b"HEAD"]
    assert requests(lambda: place.list()) == [b"GET"]
    assert requests(lambda: place.delete("a")) == [b"DELETE"]


def test_a_large_object_is_one_request_too(relay: Relay, place: S3Location) -> None:
    """A write in parts would not be create-only on every server."""
    data = bytes(110 << 20)
    assert place.create("large", data)
    assert relay.requests == [b"PUT"]
    assert not place.create("large", data[:-1])
    relay.requests.clear()
    assert len(place.read("large", limit=len(data))) == len(data)
    assert relay.requests == [b"GET"]


def test_a_functaset_is_read_by_gets_alone(relay: Relay, place: S3Location) -> None:
    filled(place.uri)
    relay.requests.clear()
    assert len(Functaset.open(place).load("train")) == 20
    assert set(relay.requests) == {b"GET"}
