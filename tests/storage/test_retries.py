"""S3 over a bad network: a relay before moto's server loses requests and answers; what is told stays true."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.config import ImagesConfig
from storage.errors import MissingObject, StorageError, TransientError
from storage.images import open_images
from storage.locations import S3Location, open_location
from storage.s3 import LONGEST_PAUSE, TRIES
from tests.storage.pictures import encoded, noise
from tests.storage.relay import Relay


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    relay = Relay((host, port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
        patch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("bad-network", region_name="eu-west-1")
        yield relay
        fsspec.filesystem("s3").clear_instance_cache()
    relay.close()
    server.stop()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def place(relay: Relay, pauses: list[float], request: pytest.FixtureRequest) -> S3Location:
    """A prefix of its own whose pauses are noted, not slept."""
    found = open_location(f"s3://bad-network/{abs(hash(request.node.name))}")
    assert isinstance(found, S3Location)
    relay.faults.clear()
    relay.requests.clear()
    return replace(found, sleep=pauses.append)


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


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["busy", "cut", "deaf"])
def test_a_created_object_whose_answer_was_lost_is_ours(relay: Relay, place: S3Location, kind: str, count: int) -> None:
    """Whether the repetition is ours or aiohttp's own, which tells nobody."""
    relay.faults += [(b"PUT", kind)] * count
    assert place.create("a", b"mine")
    assert relay.requests.count(b"PUT") == count + 1
    assert place.read("a") == b"mine"


@pytest.mark.parametrize("kind", ["busy", "cut", "deaf"])
def test_an_object_of_somebody_else_is_not_ours_whatever_was_lost(relay: Relay, place: S3Location, kind: str) -> None:
    assert place.create("a", b"theirs")
    relay.faults.append((b"PUT", kind))
    assert not place.create("a", b"mine")
    assert not place.create("a", b"mine and longer")
    assert place.read("a") == b"theirs"


def test_patience_ends_with_one_line_that_says_it_may_pass(
    relay: Relay, place: S3Location, pauses: list[float]
) -> None:
    relay.faults += [(b"PUT", "busy")] * 20
    with pytest.raises(TransientError, match=r"/a: ") as error:
        place.create("a", b"x")
    assert "\n" not in str(error.value)
    assert relay.requests.count(b"PUT") == TRIES
    assert len(pauses) == TRIES - 1
    assert sum(pauses) < 60
    assert all(later > 0.99 * sooner for sooner, later in zip(pauses, pauses[2:]))  # growing, jitter aside


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
    relay.faults += [(b"HEAD", "busy")]
    with pytest.raises(TransientError):
        load_checkpoint(hasty.child("c"))
    relay.faults[:] = [(b"HEAD", "busy")] * TRIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.s3.LONGEST_PAUSE", 0.0)
        with pytest.raises(TransientError):
            images.read_row(0)
    relay.faults.clear()
    assert images.read(range(len(images))).good.all()
