"""Encoding (plan, shards, finalise): stored latents are the field's, in any order of work and after any repetition."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.flows.config.digests import stage_config
from functa.flows.config.load import load_config
from functa.models.field.inner import InnerLoop
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.places.local import LocalLocation
from functa.tasks.encoding import keyed_images
from functa.tasks.encoding.encode import encode_group, encode_images
from functa.tasks.encoding.finalise import finalise
from functa.tasks.encoding.plan import fingerprint, plan
from functa.tasks.evaluation import compression, reconstruction
from functa.tasks.evaluation.evaluator_input import EvaluationJob
from functa.tasks.trained import load_field
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.tasks.encoding import encode, encode_job, encode_planned, file_bytes, write_noise


def test_a_stored_latent_is_the_latent_of_its_image(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s", "encode.quantization.bits=32")
    encode(work)
    stored = Functaset.open(str(tmp_path / "s")).load("test")
    images = open_images(work.images).split("test")
    batch = images.read(stored.source_rows)
    module, inner, _ = load_field(str(field))
    expected = InnerLoop(module, inner, (8, 8)).encode(torch.from_numpy(batch.images).float() / 255)
    np.testing.assert_allclose(stored.dequantized(), expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(stored.labels, np.asarray(images.labels)[stored.source_rows])


def test_the_stored_psnr_is_the_psnr_of_the_reconstruction(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s", "encode.quantization.bits=32")
    encode(work)
    stored = Functaset.open(str(tmp_path / "s")).load("test")
    pixels = torch.from_numpy(open_images(work.images).split("test").read(stored.source_rows).images).float() / 255
    module, _, _ = load_field(str(field))
    errors = (module(torch.from_numpy(stored.dequantized()), (8, 8)) - pixels).square().mean((1, 2, 3))
    np.testing.assert_allclose(stored.psnr, -10 * np.log10(errors.numpy()), atol=1e-3)


def test_eight_bits_are_within_half_a_step_of_float32(field: Path, tmp_path: Path) -> None:
    for bits in (8, 32):
        encode(encode_job(field, tmp_path / str(bits), f"encode.quantization.bits={bits}")[0])
    coded, exact = (Functaset.open(str(tmp_path / str(bits))).load("train") for bits in (8, 32))
    np.testing.assert_array_equal(coded.ids, exact.ids)
    quantizer = coded.shards[0].fragment.quantizer
    assert quantizer is not None
    outside = np.abs(coded.dequantized() - exact.dequantized()) > quantizer.step * 0.5001
    assert outside.mean() < 0.01  # clipped ones, counted in the receipts


def test_encoding_twice_changes_no_byte(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s")
    encode(work)
    before = file_bytes(tmp_path / "s")
    encode(work)
    assert file_bytes(tmp_path / "s") == before


def test_groups_in_any_order_give_the_same_latents(field: Path, tmp_path: Path) -> None:
    contents = []
    for name, turn in (("a", 1), ("b", -1)):
        work, _ = encode_job(field, tmp_path / name)
        todo = plan(work)
        for group in todo.groups[::turn]:
            encode_group(work, group, 400)
        finalise(work, todo)
        contents.append({k: v for k, v in file_bytes(tmp_path / name).items() if "/c/" in k})
    assert contents[0] == contents[1]


def test_nothing_is_visible_before_all_shards_are_done(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s")
    todo = plan(work)
    for group in todo.groups[:-1]:
        encode_group(work, group, 400)
    with pytest.raises(StorageError):
        Functaset.open(str(tmp_path / "s"))
    with pytest.raises(StorageError, match="shard"):
        finalise(work, todo)


@pytest.mark.faults
def test_another_field_is_refused_by_the_functaset(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s")
    encode(work)
    with pytest.raises(StorageError, match="field: feed -> beef"):
        plan(work.model_copy(update={"field_digest": "beef"}))


def test_the_clipping_limit_is_not_in_the_fingerprint_but_what_sets_the_ranges_is(field: Path, tmp_path: Path) -> None:
    """The limit refuses a shard and changes no latent; the range changes codes."""

    def of(*overrides: str) -> dict[str, object]:
        return fingerprint(encode_job(field, tmp_path, *overrides)[0], load_field(str(field))[2])

    bits = "encode.quantization.bits=8"
    assert of(bits, "encode.quantization.max_clip_fraction=0.5") == of(bits)
    assert of(bits, "encode.calibration_images=7") != of(bits)
    assert of(bits, "encode.quantization.margin=0.2") != of(bits)
    loose = load_config("digits", [*TINY, "encode.quantization.max_clip_fraction=0.5"])
    assert stage_config(loose, "encode") == stage_config(load_config("digits", TINY), "encode")


def test_plan_and_receipt_record_what_a_latent_was_computed_with(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s")
    encode(work)
    store = Functaset.open(str(tmp_path / "s"))
    for fragment in store.fragments:
        for versions in (fragment.plan.created_by, fragment.shards[0].receipt.versions):
            assert versions.keys() == {"torch", "numpy", "zarr", "device", "threads", "mode"}
            assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
            assert (versions["device"], versions["mode"]) == ("cpu", "eager")


def test_a_disk_without_space_is_reported_before_a_shard_is_computed(
    field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, _ = encode_job(field, tmp_path / "s", "encode.quantization.bits=32")
    latents = 400 * 4 * int(np.prod(load_field(str(field))[0].config.latent_shape))  # bytes of both splits
    free = latents
    monkeypatch.setattr(LocalLocation, "free_bytes", lambda self: free)
    with pytest.raises(StorageError, match="MB are needed and"):
        plan(work)
    free = 2 * latents
    todo = plan(work)
    for group in todo.groups:
        encode_group(work, group, 400)
    free = latents // 4  # what is written needs no space again
    assert plan(work) == todo


def test_progress_is_reported_after_each_shard(field: Path, tmp_path: Path) -> None:
    work, _ = encode_job(field, tmp_path / "s")
    reported: list[tuple[int, int, str]] = []
    group = plan(work).groups[0]
    stats = encode_group(work, group, 400, lambda *row: reported.append(row))
    assert [row[:2] for row in reported] == [(1, 2), (2, 2)]
    assert "images/s in this group (share of the time, in steps that overlap: read " in reported[0][2]
    assert stats["mode"].startswith("eager: ")
    encode_group(work, group, 400, lambda *row: reported.append(row))
    assert reported[2:] == [(2, 2, "all 2 shards exist already")]


@pytest.mark.parametrize("chosen", ["off", "on", None])
def test_the_compile_setting_of_the_encoding_run_is_used_before_the_fields(
    field: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    modes: list[str] = []

    def decide(mode: str, *_: Any) -> tuple[bool, str]:
        modes.append(mode)
        return False, "eager: in a test"

    monkeypatch.setattr("functa.tasks.encoding.encode.should_compile", decide)
    work = encode_job(field, tmp_path / "s")[0].model_copy(update={"compile": chosen})
    encode_group(work, plan(work).groups[0], 400)
    assert modes == [chosen or load_field(str(field))[1].compile]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(30):
            write_noise(folder / label / f"{i:03d}.png", 1000 * ord(label[0]) + i)
    return folder


def stored(store: Path) -> dict[str, tuple[bytes, int]]:
    """Return (latent, label) of every visible row by key."""
    functaset = Functaset.open(str(store))
    found = {}
    for split in ("train", "test"):
        latents = functaset.load(split)
        for key, z, label in zip(latents.keys, latents.dequantized(), latents.labels):
            found[key] = (z.tobytes(), int(label))
    return found


def changed_between(field: Path, folder: Path, store: Path, change: Callable[[], object]) -> dict[str, str]:
    """Change the source between planning and encoding; return the reasons of bad rows by key."""
    overrides = (
        "images.source=folder", f"images.location={folder}", "images.channels=1", "images.limit=40",
        "encode.quantization.bits=32", "images.max_bad_fraction=0.5",
    )  # fmt: skip
    work, _ = encode_job(field, store, *overrides)
    todo = plan(work)
    change()
    return {bad["key"]: bad["reason"] for bad in encode_planned(work, todo)["bad_inputs"]}


@pytest.mark.faults
def test_a_source_that_changes_while_it_is_encoded_shifts_no_row(field: Path, pictures: Path, tmp_path: Path) -> None:
    """Files are added before and between the planned ones, removed, replaced, and a class appears."""
    assert changed_between(field, pictures, tmp_path / "calm", lambda: None) == {}
    calm = stored(tmp_path / "calm")
    missing, replaced, emptied, *_ = sorted(calm)[5:]

    def change() -> None:
        for i in range(50):
            write_noise(pictures / "cat" / f"000-{i}.png", i)
        (pictures / "ant").mkdir()
        for i in range(9):
            write_noise(pictures / "ant" / f"{i}.png", i)
        (pictures / missing).unlink()
        write_noise(pictures / replaced, 4711)
        (pictures / emptied).write_bytes(b"")

    bad = changed_between(field, pictures, tmp_path / "stormy", change)
    changed = "changed since it was planned"
    assert bad == {missing: "no longer there", replaced: changed, emptied: changed}
    assert stored(tmp_path / "stormy") == {key: row for key, row in calm.items() if key not in bad}


def test_a_file_replaced_after_the_group_opened_the_source_is_bad(
    field: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = keyed_images.PlannedImages.__init__

    def late(self: keyed_images.PlannedImages, *config: Any) -> None:
        listed(self, *config)
        write_noise(pictures / "cat" / "003.png", 4711)

    def change() -> None:
        monkeypatch.setattr(keyed_images.PlannedImages, "__init__", late)

    planned_keys = {"cat/003.png"} & stored_keys(field, pictures, tmp_path / "calm")
    bad = changed_between(field, pictures, tmp_path / "s", change)
    assert planned_keys == set(bad) == {"cat/003.png"}
    assert bad["cat/003.png"] == "changed since it was planned"


def stored_keys(field: Path, folder: Path, store: Path) -> set[str]:
    changed_between(field, folder, store, lambda: None)
    return set(stored(store))


def test_images_that_have_another_size_now_are_bad_and_too_many_of_them_fail_the_run(
    field: Path, pictures: Path, tmp_path: Path
) -> None:
    def change() -> None:
        for file in pictures.glob("*/0*.png"):
            write_noise(file, 1, side=16)

    with pytest.raises(StorageError, match=r"images cannot be used.*changed since it was planned"):
        changed_between(field, pictures, tmp_path / "s", change)


def test_equal_images_have_equal_content_digests_in_any_folder(field: Path, pictures: Path, tmp_path: Path) -> None:
    def content(folder: Path, name: str) -> str:
        changed_between(field, folder, tmp_path / name, lambda: None)
        return Functaset.open(str(tmp_path / name)).content

    first = content(pictures, "a")
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy, copy_function=shutil.copyfile)  # other file times
    assert content(copy, "b") == first
    write_noise(next(iter(copy.glob("cat/*.png"))), 4711)
    write_noise(copy / "dog" / "000.png", 4712)
    assert content(copy, "c") != first


def test_images_that_the_field_was_not_trained_on_are_refused(field: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 16, 16), np.uint8), labels=np.arange(20) % 2)
    with pytest.raises(StorageError, match="trained on 8x8 images of 1 channels, these are 16x16 of 1"):
        plan(encode_job(field, tmp_path / "s", "images.source=npz", f"images.location={tmp_path}/x.npz")[0])


def test_an_image_has_the_same_latent_in_any_batch(field: Path) -> None:
    """The last batch is padded, so every call has one shape."""
    module, inner, _ = load_field(str(field))
    loop = InnerLoop(module, inner, (8, 8))
    images = np.random.default_rng(0).integers(0, 255, (13, 8, 8, 1), dtype=np.uint8)
    z, errors = encode_images(loop, images, 8)
    alone, _ = encode_images(loop, images[11:12], 8)
    torch.testing.assert_close(z[11:12], alone)
    assert len(z) == len(errors) == 13


def test_an_automatic_range_is_recorded_with_its_candidates(field: Path, tmp_path: Path) -> None:
    auto = ("encode.quantization.range=auto", "encode.quantization.bits=6", "encode.calibration_images=64")
    work, _ = encode_job(field, tmp_path / "s", *auto)
    info = encode(work)["info"]
    (ranges,) = info["ranges"]
    assert ranges["policy"].startswith("auto: ")
    assert ranges["candidates"].keys() >= {"minmax", "sigma 6"}
    assert info["fingerprint"]["quantization.range"] == "auto"
    assert info["clip_fraction"] <= 0.01
    before = file_bytes(tmp_path / "s")
    assert encode(work)["info"] == info
    assert file_bytes(tmp_path / "s") == before
    strict = encode_job(field, tmp_path / "s", *auto, "encode.quantization.max_clip_fraction=0.001")[0]
    with pytest.raises(StorageError, match="max_clip_fraction"):  # it is part of the choice
        plan(strict)


@pytest.mark.parametrize("ranges", ["auto", "minmax"])
def test_psnr_falls_with_the_number_of_bits(field: Path, tmp_path: Path, ranges: str) -> None:
    work, config = encode_job(
        field, tmp_path / "s", "encode.quantization.bits=32", f"encode.quantization.range={ranges}"
    )
    encode(work)
    asked = EvaluationJob(
        seed=0, images=config.images, quantization=config.encode.quantization, evaluation=config.evaluation,
        calibration_images=100, functaset=str(tmp_path / "s"), field=str(field), output=str(tmp_path / "run"),
        device="cpu",
    )  # fmt: skip
    measured, by_bits = reconstruction.measure(asked), compression.measure(asked)["psnr_by_bits"]
    assert by_bits.keys() == {"32", "8", "7", "6", "5", "4"}
    assert by_bits["32"] == pytest.approx(measured["psnr_test"], abs=0.01)  # from the same images
    assert by_bits["8"] == pytest.approx(by_bits["32"], abs=0.1)
    assert by_bits["32"] > by_bits["6"] > by_bits["5"] > by_bits["4"]
