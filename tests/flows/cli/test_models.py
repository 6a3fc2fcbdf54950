"""`functa sample`, `classify` and `decode` on a briefly trained root: what they promise and what they refuse."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from functa.flows.ledger import Ledger
from functa.models.field.inner import decode
from functa.storage.functaset.commit import retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.places.reused import allow_reuse
from functa.storage.runs.stage_records import read_record, write_record
from functa.tasks.config import SampleRequest
from functa.tasks.inference import png, sample_images
from functa.tasks.inputs.pictures import as_uint8
from functa.tasks.trained import field_of, load_classifier, logits_of
from tests.helpers.flows.command import error_line, here
from tests.helpers.flows.trained_root import trained_root

PIXELS = 100  # that an image may have, in the root's config
OVERRIDES = ("diffusion.ema=0", "classifier.ema=0", f"images.max_pixels={PIXELS}")


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return trained_root(tmp_path_factory.mktemp("models") / "root", *OVERRIDES)


@pytest.fixture(scope="module")
def root(ledger: Ledger) -> Path:
    return Path(ledger.root)


def drawn(root: Path, out: Path, *options: str) -> tuple[list[bytes], str]:
    """Return the PNG files of three samples, and what was printed."""
    done = here("sample", str(root), "--count", "3", "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    return [path.read_bytes() for path in sorted(out.glob("sample-*.png"))], done.stdout


def test_samples_are_drawn_with_the_settings_of_the_root(root: Path, tmp_path: Path) -> None:
    """The model is another root's, whose settings differ."""
    guided = ("diffusion.process.guidance=20", "diffusion.process.sampling_steps=6")
    reusing = trained_root(tmp_path / "reusing", *OVERRIDES, *guided, from_root=root)
    theirs, how = drawn(root, tmp_path / "theirs")
    assert "(ddpm, 4 steps, guidance 1)" in how
    asked, _ = drawn(root, tmp_path / "asked", "--guidance", "20", "--steps", "6")
    ours, how = drawn(Path(reusing.root), tmp_path / "ours")
    assert "(ddpm, 6 steps, guidance 20)" in how
    assert ours == asked
    assert not set(ours) & set(theirs)


def test_the_settings_of_the_last_evaluation_are_used(root: Path, tmp_path: Path) -> None:
    """Also where the record of training has other settings: older roots did not write their own there."""
    guided = trained_root(tmp_path / "root", *OVERRIDES, "diffusion.process.guidance=7", from_root=root)
    with guided.working("evaluate"):
        pass
    original = read_record(open_location(str(root)), "train_diffusion")
    taken = read_record(guided.location, "train_diffusion")
    assert original is not None
    assert taken is not None
    write_record(guided.location, taken.model_copy(update={"pipeline": original.pipeline}))
    assert "guidance 7)" in drawn(tmp_path / "root", tmp_path / "out")[1]


def test_the_class_of_the_samples_is_named_and_a_home_folder_expanded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = here("sample", str(root), "--count", "1", "--label", "3", "--out=~/samples")
    assert done.stdout.startswith(f"1 images of class 3 in {tmp_path}/samples (")
    assert (tmp_path / "samples/sample-000000.png").exists()
    assert not (tmp_path / "~").exists()


def test_sampler_and_steps_can_be_chosen(root: Path, tmp_path: Path) -> None:
    solved, how = drawn(root, tmp_path / "solved", "--sampler", "dpmpp", "--steps", "3")
    assert "(dpmpp, 3 steps, guidance 1)" in how
    assert not set(solved) & set(drawn(root, tmp_path / "default")[0])


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_models_of_other_processes_draw_by_heun(kind: str, root: Path, tmp_path: Path) -> None:
    process = f"diffusion.process={{kind: {kind}, guidance: 2}}"
    trained_root(tmp_path / "root", *OVERRIDES, process, "diffusion.steps=2", from_root=root)
    default, how = drawn(tmp_path / "root", tmp_path / "default")
    assert "(heun, 18 steps, guidance 2)" in how
    assert default != drawn(tmp_path / "root", tmp_path / "few", "--steps", "3")[0]
    done = here("sample", str(tmp_path / "root"), "--count", "3", "--out", str(tmp_path / "no"), "--sampler", "ddpm")
    assert f"whose process is {kind}; choose heun" in error_line(done, 1)


@pytest.mark.parametrize(
    ("overrides", "options", "line"),
    [
        ((), ["--resolution", "7"], "into 2 latent positions a side; choose a multiple of 2"),
        ((), ["--label", "10"], "label 10: the model has classes 0 to 9"),
        ((), ["--steps", "1001"], "steps 1001: the model was trained on 1000 timesteps"),
        ((), ["--sampler", "heun"], "whose process is ddpm; choose ddpm or dpmpp"),
        (["diffusion.process.label_drop=0"], ["--guidance", "0"], "label_drop=0"),
        (["diffusion.process.label_drop=0"], ["--guidance", "3"], "label_drop=0"),
        (["diffusion.process.conditional=false"], ["--guidance", "1"], "unconditional, so it takes no guidance"),
        (["diffusion.process.conditional=false"], ["--label", "3"], "unconditional, so it takes no label"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_model_cannot_do_is_reported_before_anything_is_drawn(
    overrides: list[str], options: list[str], line: str, root: Path, tmp_path: Path
) -> None:
    """Drawing a million would take hours."""
    if overrides:
        trained_root(tmp_path / "root", *OVERRIDES, "diffusion.steps=1", *overrides, from_root=root)
        root = tmp_path / "root"
    done = here("sample", str(root), "--count", "1000000", "--out", str(tmp_path / "out"), *options)
    assert line in error_line(done, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["sample", "--count", "1000000"], ["decode"]], ids=str)
def test_a_folder_that_cannot_be_written_is_reported_before_any_work(
    command: list[str], root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = here(command[0], str(root), *command[1:], "--out", str(out))
        assert f"{out}: cannot be written" in error_line(done, 1)


def test_a_model_that_never_dropped_a_label_and_one_without_labels_draw(root: Path, tmp_path: Path) -> None:
    for name in ("label_drop=0", "conditional=false"):
        place = tmp_path / name
        trained_root(place, *OVERRIDES, "diffusion.steps=1", f"diffusion.process.{name}", from_root=root)
        assert len(drawn(place, place / "out")[0]) == 3


def test_a_sheet_shows_the_first_256_and_a_sample_is_the_same_in_any_batch(root: Path, tmp_path: Path) -> None:
    done = here("sample", str(root), "--count", "257", "--out", str(tmp_path / "out"), "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "257 images in" in done.stdout
    assert "contact sheet of the first 256:" in done.stdout
    assert len(list((tmp_path / "out").glob("sample-*.png"))) == 257
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.size == (8 * 68 + 4, 32 * 68 + 4)  # 8x8 pixels eight times as large, and borders of four
    again, _ = drawn(root, tmp_path / "again", "--steps", "2")
    for number, data in enumerate(again):
        few = np.asarray(Image.open(io.BytesIO(data)), int)
        many = np.asarray(Image.open(tmp_path / "out" / f"sample-{number:06d}.png"), int)
        assert np.abs(few - many).max() <= 1  # a batch's arithmetic, rounded


def test_what_is_drawn_before_an_interruption_remains(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_images, "SAMPLE_BATCH", 4)
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_images.sample_images(str(root), SampleRequest(count=20), tmp_path, interrupt)
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == [f"sample-{i:06d}.png" for i in range(4)]
    assert seen == [(1, 20), (2, 20), (3, 20), (4, 20), (5, 20)]


def test_an_interrupted_command_prints_where_its_images_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(png, "save_png", interrupted)
    for command in ("sample", "decode"):
        assert f"images made so far are in {tmp_path}" in error_line(
            here(command, str(root), "--out", str(tmp_path)), 130
        )


def test_decoding_reads_the_shards_of_its_rows_alone(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "root")
    functaset = Functaset.open(str(copy / "functaset.zarr"))
    field, _, side = field_of(functaset)
    z = torch.from_numpy(functaset.load("test").dequantized(np.arange(60, 70)))
    expected = as_uint8(decode(field, z, (side, side)))[..., 0]
    (plan,) = [fragment.plan for fragment in functaset.fragments if fragment.split == "test"]
    shards = sorted(path for path in (copy / "functaset.zarr" / plan.path / "z" / "c").rglob("*") if path.is_file())
    assert len(shards) == 4
    shards[2].write_bytes(b"")  # rows 128 to 191
    done = here("decode", str(copy), "--rows", "60:70", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in written] == [f"test-{row:06d}.png" for row in range(60, 70)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in written]), expected)
    assert plan.path in error_line(here("decode", str(copy), "--rows", "100:129", "--out", str(tmp_path / "out")), 1)


def write_digits(ledger: Ledger, folder: Path, count: int) -> list[str]:
    """The first test images as PNG files, named by number; their keys."""
    split = open_images(ledger.config.images).split("test")
    folder.mkdir()
    for number, pixels in enumerate(split.read(range(count)).images):
        Image.fromarray(pixels[..., 0]).save(folder / f"{number:03d}.png")
    return split.keys[:count]


def test_images_are_classified_as_their_latents_are(ledger: Ledger, root: Path, tmp_path: Path) -> None:
    keys = write_digits(ledger, tmp_path / "digits", 70)  # more than go at a time
    done = here("classify", str(root), str(tmp_path / "digits"), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["image"] for row in rows] == [f"{number:03d}.png" for number in range(70)]
    model, normalizer, _ = load_classifier(str(root / "checkpoints" / "classifier"))
    latents = Functaset.open(str(root / "functaset.zarr")).load("test")
    places = [latents.keys.index(key) for key in keys]
    z = torch.from_numpy(latents.dequantized(np.array(places)))
    probabilities = torch.softmax(logits_of(model, normalizer.normalize(z)), -1).numpy()
    for row, expected in zip(rows, probabilities, strict=True):  # of 8 bits a number there, of 32 here
        assert row["probability"] == pytest.approx(expected[row["label"]], abs=0.02)
        assert row["class"] == str(row["label"])
        assert row["top"][0] == [row["class"], row["probability"]]
        assert expected[row["label"]] >= expected.max() - 0.04
    assert len({row["label"] for row in rows}) > 5


def test_what_cannot_be_read_is_a_row_and_nothing_else_suffers(ledger: Ledger, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    write_digits(ledger, folder, 2)
    alone = here("classify", str(root), str(folder / "001.png")).stdout
    (folder / "000.png").write_bytes(b"\x89PNG, but not for long")
    Image.new("L", (10, 11)).save(folder / "002.png")
    done = here("classify", str(root), str(folder))
    assert done.returncode == 0, done.stderr
    damaged, good, large = done.stdout.splitlines()
    assert damaged.startswith("000.png: cannot be read: does not decode")
    assert good == alone.strip()
    assert large == f"002.png: cannot be read: 10x11 pixels are more than images.max_pixels={PIXELS}"
    (folder / "001.png").unlink()
    assert here("classify", str(root), str(folder)).returncode == 1


def test_files_that_are_not_classified_are_counted(root: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    done = here("classify", str(root), str(tmp_path))
    assert done.returncode == 0
    assert "left out 3 files that have no ending of an image: 2 .heic, 1 .txt" in done.stderr


def test_one_note_reports_that_images_are_reduced_to_what_the_model_knows(root: Path, tmp_path: Path) -> None:
    for name, mode, size in (("a", "RGB", (8, 8)), ("b", "L", (9, 9)), ("c", "L", (8, 8))):
        Image.new(mode, size).save(tmp_path / f"{name}.png")
    reduced = "images are reduced to 8x8 grey pixels"
    assert here("classify", str(root), str(tmp_path)).stderr.count(reduced) == 1
    assert [here("classify", str(root), str(tmp_path / f"{name}.png")).stderr.count(reduced) for name in "abc"] == [
        1, 1, 0,
    ]  # fmt: skip


def test_a_file_that_is_no_image_is_named_as_that(root: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    done = here("classify", str(root), str(tmp_path / "notes.txt"))
    assert done.returncode == 1
    assert done.stdout.startswith("notes.txt: cannot be read: does not decode: not an image of a known format (PNG, ")


def test_a_folder_without_images_and_one_that_is_not_there_are_two_faults(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no image is there (.png" in error_line(here("classify", str(root), str(tmp_path / "empty")), 1)
    for place in (str(tmp_path / "none"), f"file://{tmp_path}/none"):
        assert f"{place}: no such folder or file" in error_line(here("classify", str(root), place), 1)


def test_a_stage_that_the_run_does_not_have_is_named(root: Path, tmp_path: Path) -> None:
    without = ("classifier=null", "diffusion=null")
    trained_root(tmp_path / "root", *OVERRIDES[2:], *without, from_root=root, stages=("meta_train", "encode"))
    for command, section in ((["classify", str(tmp_path)], "classifier"), (["sample", "--out", "x"], "diffusion")):
        line = error_line(here(command[0], str(tmp_path / "root"), *command[1:]), 1)
        assert f"its config has {section}=null, so it has no " in line


@pytest.mark.faults
def test_models_of_other_latents_are_refused_and_later_commits_are_as_good(
    ledger: Ledger, root: Path, tmp_path: Path
) -> None:
    write_digits(ledger, tmp_path / "digits", 1)
    copy = shutil.copytree(root, tmp_path / "copy")
    functaset = Functaset.open(str(copy / "functaset.zarr"))
    retire(functaset.location, "train", functaset.load("train").keys[:1])
    assert here("classify", str(copy), str(tmp_path / "digits")).returncode == 0
    assert here("sample", str(copy), "--count", "1", "--out", str(tmp_path / "out")).returncode == 0

    other = trained_root(
        tmp_path / "other", *OVERRIDES, "encode.quantization.bits=5", from_root=root, stages=("meta_train", "encode")
    )
    for stage in ("train_classifier", "train_diffusion"):
        record = read_record(open_location(str(root)), stage)
        assert record is not None
        allow_reuse(other.location, f"{root}/{record.output}")
        write_record(other.location, record.model_copy(update={"output": f"{root}/{record.output}"}))
    for command in (["classify", str(tmp_path / "digits")], ["sample", "--out", str(tmp_path / "refused")]):
        line = error_line(here(command[0], other.root, *command[1:]), 1)
        assert "trained on a functaset of another fingerprint (quantization.bits" in line
    assert not (tmp_path / "refused").exists()
