"""A GPU session in one command: what is carried, what is chosen, and the whole of it in small."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.session.kept import Kept, forget_optimizer
from benchmarks.session.packs import COLUMNS, ROWS, SHEET, SIDE, pack, prepare, read_sheet
from benchmarks.session.pieces import PAPER, PIECES, Piece, choose, config_of, rehearsal
from benchmarks.session.table import table
from functa.flows.config.presets import preset_names
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint, save_checkpoint
from functa.tasks.training_jobs import MetaTrainJob
from tests.helpers.benchmark_script import PROJECT, run

FIELD = "8x8x16/checkpoints/field"


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    """A folder of one sheet of test and three of training images; every image has a grey of its own, modulo 251."""
    folder, generator = tmp_path / "sheets", np.random.default_rng(0)
    folder.mkdir()
    for number, name in enumerate(("test_00", "train_00", "train_01", "train_02")):
        greys = (np.arange(SHEET) + 7 * number) % 251
        tiles = greys.astype(np.uint8).reshape(ROWS, 1, COLUMNS, 1, 1) + np.zeros((1, SIDE, 1, SIDE, 3), np.uint8)
        pixels = tiles.reshape(ROWS * SIDE, COLUMNS * SIDE, 3)
        Image.fromarray(pixels).save(folder / f"{name}.webp", lossless=True, quality=0, method=0)
    labels = {f"{split}_labels": generator.integers(0, 10, n * SHEET) for split, n in (("test", 1), ("train", 3))}
    np.savez(folder / "labels.npz", **labels)
    return folder


def test_packs_are_small_enough_and_add_up_to_all_images(sheets: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in sheets.iterdir())
    mib = (3.2 * largest + 20_000) / 2**20  # labels and two sheets
    packs = pack(sheets, tmp_path / "packs", mib)
    assert len(packs) == 2
    assert all(path.stat().st_size <= mib * 2**20 for path in packs)
    first = tmp_path / "first"
    first.mkdir()
    packs[0].rename(first / packs[0].name)
    folder, counts = prepare(first, tmp_path / "cache")
    assert counts == {"test": 1000, "train": 1000}
    folder, counts = prepare(tmp_path / "packs", tmp_path / "cache")  # a second call on the same machine
    assert counts == {"test": 1000, "train": 3000}
    assert prepare(None, tmp_path / "cache") == (folder, counts)
    labels = np.load(sheets / "labels.npz")
    for split in ("test", "train"):
        arrays = np.load(folder / f"{split}.npz")
        assert np.array_equal(arrays["labels"], labels[f"{split}_labels"])
        names = sorted(sheets.glob(f"{split}_*.webp"))
        assert np.array_equal(arrays["images"], np.concatenate([read_sheet(path) for path in names]))
    assert np.load(folder / "train.npz")["images"][1003, 0, 0, 0] == (3 + 14) % 251
    assert prepare(folder, tmp_path / "other") == (folder, counts)  # arrays are used where they are


def test_images_without_test_images_are_refused(sheets: Path, tmp_path: Path) -> None:
    (sheets / "test_00.webp").unlink()
    with pytest.raises(SystemExit, match=r"no test images.*images-0.tar first"):
        prepare(sheets, tmp_path / "cache")


@pytest.mark.attacks
def test_a_pack_writes_nothing_but_sheets_and_labels(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "packs").mkdir()
    with tarfile.open(tmp_path / "packs" / "images-0.tar", "w") as archive:
        archive.add(tmp_path / "file", "../outside.webp")
        archive.add(tmp_path / "file", "train.npz")
    with pytest.raises(SystemExit):
        prepare(tmp_path / "packs", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "outside.webp").exists()


@pytest.mark.parametrize("piece", [*PIECES, *rehearsal(PIECES)], ids=lambda piece: piece.name)
def test_every_piece_is_a_preset_whose_settings_fit(piece: Piece, tmp_path: Path) -> None:
    config = config_of(piece, str(tmp_path))
    assert config.images.location == str(tmp_path)
    spatial, channels = config.field.spatial, config.field.channels
    latent = f"vector {channels}" if spatial == 1 else f"{spatial}x{spatial}x{channels}"
    assert piece.row.removesuffix(" bilinear") == latent
    assert piece.row.endswith("bilinear") == (config.field.interpolation == "bilinear")
    assert PAPER[piece.row] in preset_names()


def test_the_most_valuable_piece_that_fits_is_chosen() -> None:
    def chosen(finished: list[str], minutes: float, progress: dict[str, float] | None = None, failed: str = "") -> str:
        piece = choose(PIECES, {failed}, finished, progress or {}, minutes, least=2.5)
        return piece.name if piece else ""

    fields = ["8x8x16/field", "4x4x64/field"]
    assert chosen([], 9) == "8x8x16/field"
    assert chosen([], 9, failed="8x8x16/field") == "4x4x64/field"  # and nothing that needs the field that failed
    assert chosen(fields, 9) == "8x8x16/classifier"
    assert chosen(fields, 4) == "vector 1024/field"  # a classifier does not fit, and could not go on elsewhere
    assert chosen(fields, 4, {"8x8x16/classifier": 0.9}) == "8x8x16/classifier"
    assert chosen(fields, 2) == ""
    assert chosen([piece.name for piece in PIECES], 9) == ""


def leave_checkpoint(work: Path, step: int, finished: bool = False) -> None:
    tensors = {"model.w": np.full(4, step, np.float32), "optimizer.0.step": np.zeros(1000, np.float32)}
    save_checkpoint(open_location(str(work / FIELD)), step, tensors, {"finished": finished})


def test_the_state_of_a_field_travels_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.session.kept.PART", 5000)
    kept, here, there = Kept(tmp_path / "out", False), tmp_path / "here", tmp_path / "there"
    kept.of("8x8x16/field")["progress"] = 0.5
    kept.of("4x4x64/field")["progress"] = 0.2
    leave_checkpoint(here, 10)
    leave_checkpoint(here, 20)
    assert kept.save(here, 1 << 20) == []
    names = sorted(path.name for path in kept.folder.iterdir())
    assert len(names) == 1 + 3 and all(path.stat().st_size <= 5000 for path in kept.folder.glob("state-*"))
    other = Kept(tmp_path / "out", False)
    other.restore(there)
    other.check_progress(there)
    found = load_checkpoint(open_location(str(there / FIELD)))
    assert found is not None and found.step == 20 and found.tensors["model.w"][0] == 20
    assert other.progress == {"8x8x16/field": 0.5, "4x4x64/field": 0.0}  # of the second there is no checkpoint
    leave_checkpoint(there, 30)
    other.restore(there)  # a newer checkpoint on this machine is kept
    found = load_checkpoint(open_location(str(there / FIELD)))
    assert found is not None and found.step == 30
    assert other.save(there, 1000) == ["8x8x16/field"]  # too large to be carried


def test_a_state_with_a_lost_part_is_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "out", False)
    kept.of("8x8x16/field")
    leave_checkpoint(tmp_path / "work", 10)
    kept.save(tmp_path / "work", 1 << 20)
    (part,) = kept.folder.glob("state-*")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="were altered"):
        kept.restore(tmp_path / "other")
    part.unlink()
    with pytest.raises(SystemExit, match="is missing"):
        kept.restore(tmp_path / "other")
    with pytest.raises(SystemExit, match="holds a measurement"):
        Kept(tmp_path / "out", rehearsal=True)


def test_a_finished_field_is_carried_without_its_optimiser(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 10, finished=True)
    forget_optimizer(tmp_path / FIELD)
    found = load_checkpoint(open_location(str(tmp_path / FIELD)))
    assert found is not None and found.step == 10 and set(found.tensors) == {"model.w"} and found.metadata["finished"]


def test_the_table_sets_what_was_measured_beside_the_paper() -> None:
    empty = table(PIECES, {}).splitlines()
    assert empty[0] == "nothing is measured yet"
    assert "| 8x8x16 | not measured | 37.2 | not measured | 90.3 | not measured |  |" in empty
    assert "| vector 1024 | not measured | 38.1 | not measured | 66.7 | not measured |  |" in empty
    made = {"device": "NVIDIA H200", "torch": "2.11", "train_images": [27000, 50000], "seen": 4e6, "seconds": 200.4}
    finished = {"8x8x16/field": made | {"psnr": 38.123, "psnr_pooled": 37.0, "test_images": 9000}}
    lines = table(PIECES, finished).splitlines()
    assert lines[0] == "NVIDIA H200, torch 2.11"
    training = "field: 4.00M of 27,000 then 50,000 images, 200 s"
    row = f"| 8x8x16 | **38.12** (pooled 37.00) | 37.2 | not measured | 90.3 | not measured | {training} |"
    assert row in lines


def write_images(folder: Path) -> None:
    """Write smooth images of ten classes: the class decides the colour of a corner."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 32)
    for split, count in (("train", 300), ("test", 100)):
        labels = np.arange(count) % 10
        tones = generator.random((count, 2, 3))
        tones[:, 0, 0] = labels / 10
        images = tones[:, 0, None, None] * ramp[:, None, None] + tones[:, 1, None, None] * ramp[None, :, None]
        np.savez(folder / f"{split}.npz", images=(127 * images).astype(np.uint8), labels=labels)


def test_a_trial_decides_the_steps_once_and_added_images_do_not_begin_a_field_again(tmp_path: Path) -> None:
    from benchmarks.session.work import TRIAL, Session, trained

    piece, kept, jobs = PIECES[0], Kept(tmp_path / "out", False), list[MetaTrainJob]()

    def train(job: MetaTrainJob, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        jobs.append(job)
        steps = job.meta_train.steps
        emit({"step": steps, "steps": steps, "images_per_s": 50.0 * job.meta_train.batch})
        return {}

    config = config_of(piece, str(tmp_path))
    sections = {name: getattr(config, name) for name in ("images", "field", "inner", "meta_train")}
    job = MetaTrainJob(seed=0, device="cpu", output=str(tmp_path / "field"), digest="", **sections)
    for count in (27_000, 50_000):
        counts = {"train": count, "test": 9000}
        figures = trained(piece, job, train, Session(kept, tmp_path, tmp_path, counts, "cpu", lambda: None))
    steps = int(50 * 60 * piece.minutes)
    assert [each.meta_train.steps for each in jobs] == [TRIAL["cpu"], steps, steps]
    assert jobs[1].digest == jobs[2].digest != jobs[0].digest
    assert jobs[0].output != jobs[1].output == job.output
    assert figures["train_images"] == [27_000, 50_000] and figures["seen"] == steps * job.meta_train.batch
    assert kept.progress == {piece.name: 1.0}


OVERTIME = """
import time
from benchmarks.session.clock import Clock
begun = time.monotonic()
clock = Clock(begun, 2 / 60, lambda: print("saved", flush=True))
clock.start()
while True:
    try:
        time.sleep(60)
    except SystemExit as stopped:
        print(stopped.code, clock.over, flush=True)  # and what runs goes on
"""


def test_nothing_outlasts_the_minutes_of_a_call() -> None:
    """At the soft end it is asked to stop; what does not is cut, after saving."""
    done = subprocess.run([sys.executable, "-c", OVERTIME], cwd=PROJECT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["143 True", "saved"] and "continues at its last checkpoint" in lines[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_session_is_rehearsed_interrupted_and_continued(tmp_path: Path) -> None:
    """SIGTERM in the first call; the second one, on another machine, does the rest."""
    write_images(tmp_path)
    out = tmp_path / "out"
    options = ["--rehearse", "--out", str(out), "--images", str(tmp_path)]
    command = [sys.executable, "benchmarks/campaign.py", *options, "--minutes", "5", "--work", str(tmp_path / "one")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'step': " in line and "4x4x64" in "".join(lines):  # the second field is being trained
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    plan = json.loads((out / "plan.json").read_text())
    assert 0 < plan["pieces"]["4x4x64/field"]["progress"] < 1
    text = run("campaign", *options, "--minutes", "9", "--work", tmp_path / "two")
    assert "4x4x64/field: step 0 " not in text  # it went on where it was
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    results: dict[str, Any] = {row["piece"]: row for row in rows}
    assert list(results) == [piece.name for piece in PIECES]
    assert not any("error" in row for row in results.values()), results
    assert all(row["train_images"] == [256] for row in results.values())
    assert results["8x8x16/field"]["test_images"] == 100
    assert results["8x8x16/diffusion"]["samples"] == 128
    assert len(list(out.iterdir())) <= 8
    assert run("campaign", "--out", out, "--table").count("not measured") == 2 * (len(PAPER) - 1)  # one row has all
    assert run("campaign", "--out", out, "--list").count("finished") == len(PIECES)
