"""Fewer bits from a functaset of 32 bits: the very functaset that encoding makes, without inner steps."""

from pathlib import Path
from typing import Any

import pytest

from functa.flows.ledger import images_digest
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.runs.stage_records import write_record
from functa.tasks.encoding import encode as encoding
from functa.tasks.encoding.plan import EncodeJob
from tests.helpers.flows.trained_root import trained_root
from tests.helpers.tasks.encoding import encode, encode_job, flip_bit

FEW = ("encode.quantization={bits: 4, range: sigma, sigma: 2, max_clip_fraction: 1}", "encode.augmentation.count=1")


@pytest.fixture(scope="module")
def exact(field: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A functaset of 32 bits."""
    store = tmp_path_factory.mktemp("exact") / "s"
    encode(encode_job(field, store, *FEW, "encode.quantization={bits: 32}")[0])
    return str(store)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of images that are encoded, batch by batch."""
    counts: list[int] = []
    real = encoding.encode_images

    def counting(loop: Any, images: Any, batch: int) -> Any:
        counts.append(len(images))
        return real(loop, images, batch)

    monkeypatch.setattr(encoding, "encode_images", counting)
    return counts


def few(field: Path, store: Path, latents: str, *more: str) -> tuple[EncodeJob, Functaset]:
    job = encode_job(field, store, *FEW, *more)[0].model_copy(update={"latents": latents})
    encode(job)
    return job, Functaset.open(str(store))


def test_the_functaset_is_the_one_that_encoding_makes_clipped_rows_included(
    field: Path, exact: str, tmp_path: Path, encoded: list[int]
) -> None:
    _, plain = few(field, tmp_path / "plain", "")
    assert sum(encoded) == 600  # 200 training images in two views each, 200 test images
    encoded.clear()
    _, taken = few(field, tmp_path / "taken", exact)
    assert encoded == []
    assert taken.content == plain.content
    assert taken.info()["clip_fraction"] == plain.info()["clip_fraction"] > 0
    for split in ("train", "test"):
        assert (taken.load(split).psnr == plain.load(split).psnr).all()
    before = Functaset.open(exact).load("test").psnr
    assert (taken.load("test").psnr < before - 0.01).any()  # that of the clipped latent


def test_shards_that_the_other_functaset_lacks_are_encoded(
    field: Path, exact: str, tmp_path: Path, encoded: list[int]
) -> None:
    _, other = few(field, tmp_path / "other", exact, "encode.shard_rows=96")  # cut in another way
    assert sum(encoded) == 600
    encoded.clear()
    copy = tmp_path / "copy"
    encode(encode_job(field, copy, *FEW, "encode.quantization={bits: 32}")[0])
    assert sum(encoded) == 600
    encoded.clear()
    flip_bit(next(path for path in sorted(copy.rglob("z/c/0/**/0")) if path.is_file()))
    _, repaired = few(field, tmp_path / "repaired", str(copy))
    assert 0 < sum(encoded) <= 64  # the images of the damaged shard
    assert repaired.content == few(field, tmp_path / "whole", exact)[1].content
    assert other.rows("train") == repaired.rows("train") == 400


def test_a_root_takes_the_latents_of_the_one_that_it_reuses_where_only_bits_differ(tmp_path: Path) -> None:
    bits, stages = "encode.quantization.bits", ("meta_train", "encode")
    first = trained_root(tmp_path / "first", f"{bits}=32", stages=stages)
    encoded = first.require("encode")
    functaset, seen = first.output(encoded), {"images_digest": images_digest(open_images(first.config.images))}
    write_record(first.location, encoded.model_copy(update={"figures": encoded.figures | seen}))  # as the flow does
    six = trained_root(tmp_path / "six", f"{bits}=6", from_root=tmp_path / "first", stages=stages)
    assert six.float_latents() == functaset
    assert six.output(six.require("encode")) != functaset
    assert first.float_latents() == ""
    for more in (["encode.steps=4"], ["encode.augmentation.count=1"], ["images.limit=150"], ["field.w0=9"]):
        other = trained_root(tmp_path / "-".join(more), f"{bits}=6", *more, from_root=tmp_path / "first", stages=())
        assert other.float_latents() == ""
    write_record(first.location, encoded.model_copy(update={"figures": encoded.figures | {"images_digest": "other"}}))
    assert six.float_latents() == ""  # images have changed since
    again = trained_root(tmp_path / "five", f"{bits}=5", from_root=tmp_path / "six", stages=stages)
    assert again.float_latents() == ""  # 6 bits are not the latents
