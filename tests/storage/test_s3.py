"""The same store on s3://, against moto's server: the wire calls are real, the server is not."""

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.config import ImagesConfig
from storage.errors import MissingObject, StorageError
from storage.functaset import Functaset
from storage.images import open_images
from storage.locations import open_location
from storage.progress import status
from storage.verification import verify
from tests.storage.filled import filled, latents_of, plan, write
from tests.storage.pictures import encoded, noise


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
        patch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        fsspec.filesystem("s3").mkdir("functa-bucket", region_name="eu-west-1")
        yield "s3://functa-bucket"
    server.stop()


def test_places_behave_as_on_disk(bucket: str) -> None:
    place = open_location(f"{bucket}/places")
    place.preflight_write()
    assert place.list() == []
    assert place.create("a/b", b"first")
    assert not place.create("a/b", b"second")
    place.write("a/c", b"x")
    place.write("a/c", b"yy")
    assert place.read("a/b") == b"first"
    assert place.size("a/c") == 2
    assert place.size("a/d") is None
    assert place.list() == place.list("a/") == ["a/b", "a/c"]
    assert place.list("none/") == []
    tokens = [entry.token for entry in place.entries()]
    place.write("a/c", b"zz")
    assert [entry.token == token for entry, token in zip(place.entries(), tokens)] == [True, False]
    place.delete("a/c")
    place.delete("a/c")
    with pytest.raises(MissingObject):
        place.read("a/c")


def test_a_functaset_is_written_read_and_verified(bucket: str) -> None:
    place = filled(f"{bucket}/store")
    train = Functaset.open(f"{bucket}/store").load("train")
    assert np.abs(train.dequantized() - latents_of(train.keys)).max() < 0.01
    assert verify(place, deep=True).bad == []
    assert status(place)["left"] == 0
    first = write(place, plan(place), 0)
    assert first.rows == 8
    fragment = Functaset.open(place).fragments[0][0].fragment
    place.write(f"fragments/{fragment}/z/c/1/0/0/0", b"garbage")
    assert [bad["path"] for bad in verify(place).bad] == [f"fragments/{fragment}/z/c/1/0/0/0"]
    with pytest.raises(StorageError, match=f"fragments/{fragment}/z/c/1/0/0/0"):
        Functaset.open(place).load("train")


def test_zarr_opens_the_store_by_itself(bucket: str) -> None:
    import zarr

    place = filled(f"{bucket}/zarr")
    fragment = Functaset.open(place).fragments[0][0].fragment
    group = zarr.open_group(place.zarr_store(read_only=True), mode="r", zarr_format=3)
    codes = np.asarray(group[f"fragments/{fragment}/z"][:])
    np.testing.assert_array_equal(codes, Functaset.open(place).load("train").codes)


def test_checkpoints_and_image_folders_lie_there_too(bucket: str) -> None:
    from PIL import Image

    place = open_location(f"{bucket}/run")
    for step in (1, 2, 3):
        save_checkpoint(place.child("checkpoints"), step, {"w": np.arange(step)}, {})
    found = load_checkpoint(place.child("checkpoints"))
    assert found is not None
    assert found.step == 3
    for i in range(4):
        place.write(f"images/cat/{i}.png", encoded(Image.fromarray(noise(i))))
    images = open_images(ImagesConfig(source="folder", location=f"{bucket}/run/images"))
    batch = images.split("train").read(range(len(images.split("train"))))
    assert batch.good.all()
    assert len(batch.good) == 3


def test_what_is_wrong_is_one_line_without_the_secret(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError) as error:
        open_location("s3://no-such-bucket/x").preflight_write()
    faults = [str(error.value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageError) as error:
        open_location(bucket).preflight_write()
    faults.append(str(error.value))
    fsspec.filesystem("s3").clear_instance_cache()
    assert "no-such-bucket" in faults[0]
    assert dead in faults[1]
    for fault in faults:
        assert "\n" not in fault
        assert "canary-secret" not in fault
