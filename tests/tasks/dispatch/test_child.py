"""Training in a child process: its figures, its errors, and that it never outlives its parent."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from functa.flows.config.load import load_config
from functa.tasks.config import PixelClassifierConfig, TrainClassifierConfig
from functa.tasks.dispatch import child
from functa.tasks.dispatch.child import TrainingFailed, train_in_child
from functa.tasks.training.__main__ import error_line, line
from functa.tasks.training_jobs import ClassifierJob, MetaTrainJob, PixelClassifierJob, TrainingJob
from tests.helpers.storage.functasets import tree

PROJECT = Path(__file__).parents[3]

PARENT = (
    "import sys; from functa.tasks.dispatch.child import train_in_child; "
    "from functa.tasks.training_jobs import JOBS; "
    "train_in_child(JOBS.validate_json(sys.argv[1]), lambda row: print('row', flush=True))"
)

COMMON: dict[str, Any] = {"seed": 0, "device": "cpu", "output": "out", "digest": "d"}


def job(output: Path, *overrides: str) -> MetaTrainJob:
    base = ["meta_train.steps=8", "meta_train.warmup=0", "meta_train.log_every=1", "meta_train.validation_images=8"]
    config = load_config("digits", [*base, *overrides])
    return MetaTrainJob(
        seed=0, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        device="cpu", output=str(output), digest="d",
    )  # fmt: skip


def test_a_run_returns_its_figures_and_reports_progress(tmp_path: Path) -> None:
    rows: list[dict] = []  # type: ignore[type-arg]
    figures = train_in_child(job(tmp_path), rows.append)
    assert len(figures["weights_digest"]) == 16
    assert rows[-1]["step"] == 8
    assert rows[-1]["psnr"] > 5


@pytest.mark.slow
def test_two_runs_of_one_job_give_the_same_weights(tmp_path: Path) -> None:
    digests = {train_in_child(job(tmp_path / name), lambda _: None)["weights_digest"] for name in "ab"}
    assert len(digests) == 1


def test_a_failing_run_reports_one_line_and_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as caught:
        train_in_child(job(tmp_path, "images.source=folder", f"images.location={tmp_path}/none"), lambda _: None)
    assert "none: no such folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caught.value.may_pass
    assert not caught.value.by_config


def test_a_diverged_run_failed_by_its_config(tmp_path: Path) -> None:
    rate = ["meta_train.learning_rate=10", "field.w0=1000", "meta_train.clip_norm=null", "meta_train.steps=1000"]
    with pytest.raises(TrainingFailed, match="so training stopped before the update") as caught:
        train_in_child(job(tmp_path, *rate, "meta_train.optimizer=adam"), lambda _: None)
    assert (caught.value.may_pass, caught.value.by_config) == (False, True)
    again = pickle.loads(pickle.dumps(caught.value))  # as between the processes of a task runner
    assert (str(again), again.may_pass, again.by_config) == (str(caught.value), False, True)


@pytest.mark.parametrize("text", ["x" * 9000, "\N{GRINNING FACE}" * 9000, "\n" * 9000, "\udcff" * 9000, "caf\xe9"])
def test_a_row_of_a_rank_is_one_write_that_cannot_mix_with_another_row(text: str) -> None:
    for row in ({"error": text, "may_pass": False}, {"note": text}):
        written = line(row)
        assert len(written.encode()) < 4096
        (key, cut), *rest = json.loads(written).items()
        assert text.startswith(cut)
        assert len(cut) >= min(len(text), 200)
        assert [(key, text), *rest] == list(row.items())


def test_a_relative_location_is_relative_to_the_callers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(40) % 2)
    monkeypatch.chdir(tmp_path)
    train_in_child(job(Path("out"), "images.source=npz", "images.location=mine.npz"), lambda _: None)
    assert list((tmp_path / "out").glob("step-*.json"))


def test_a_killed_run_may_be_retried(tmp_path: Path) -> None:
    def kill(_: object) -> None:
        for process in child._children:
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(TrainingFailed, match="was killed by SIGKILL") as caught:
        train_in_child(job(tmp_path, "meta_train.steps=100000"), kill)
    assert caught.value.may_pass


@pytest.mark.faults
def test_an_interrupted_call_stops_its_child_which_saves_first(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(row: dict) -> None:  # type: ignore[type-arg]
        if row.get("step", 0) > 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_in_child(job(tmp_path, "meta_train.steps=100000"), interrupt)
    assert not child._children
    assert list(tmp_path.glob("step-*.json"))


def test_children_can_be_stopped_from_another_thread(tmp_path: Path) -> None:
    failed: list[Exception] = []

    def call() -> None:
        try:
            train_in_child(job(tmp_path, "meta_train.steps=100000"), lambda row: started.set())
        except TrainingFailed as error:
            failed.append(error)

    started = threading.Event()
    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(60)
    child.stop_children()
    thread.join(60)
    child.allow_children()
    assert failed
    assert not thread.is_alive()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_child_ends_when_its_parent_is_killed(devices: int, tmp_path: Path) -> None:
    endless = job(tmp_path, "meta_train.steps=100000").model_copy(update={"devices": devices})
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, endless.model_dump_json()],
        cwd=PROJECT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout
    assert parent.stdout.readline() == "row\n"
    below = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(below, 60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.faults
@pytest.mark.slow
def test_a_stopped_training_that_wakes_after_another_has_finished_writes_nothing(tmp_path: Path) -> None:
    """Its parent was killed meanwhile: a checkpoint or a curve of its own would replace what the other one made."""
    out = tmp_path / "out"
    todo = job(out, "meta_train.steps=400", "meta_train.checkpoint_seconds=2")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, todo.model_dump_json()], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    for _ in range(2):
        assert parent.stdout.readline() == "row\n"
    (late,) = psutil.Process(parent.pid).children()
    late.suspend()
    while late.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    train_in_child(todo, lambda row: None)  # longer than 2 s: a checkpoint of the other one is due when it wakes
    before = tree(out)
    late.resume()
    _, alive = psutil.wait_procs([late], 60)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    assert tree(out) == before


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    ranks: list[psutil.Process] = []

    def kill(row: dict) -> None:  # type: ignore[type-arg]
        if "step" in row and not ranks:
            (launcher,) = child._children
            ranks.extend(psutil.Process(launcher.pid).children())
            launcher.kill()

    with pytest.raises(TrainingFailed, match="was killed by SIGKILL"):
        train_in_child(job(tmp_path, "meta_train.steps=100000").model_copy(update={"devices": 2}), kill)
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, 30)[1]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("job", "fix"),
    [
        (
            ClassifierJob(**COMMON, functaset="", classes=2, classifier=TrainClassifierConfig(batch=1024)),
            "lower classifier.micro_batch (now null: the whole batch of 1024), or set classifier.precision=bf16",
        ),
        (
            job(Path("out"), "meta_train.batch=16", "meta_train.micro_batch=4"),
            "lower meta_train.micro_batch (now 4), or set inner.checkpoint=true",
        ),
        (
            PixelClassifierJob(
                **COMMON, images=load_config("digits").images, pixel_classifier=PixelClassifierConfig(batch=128)
            ),
            "lower evaluation.pixel_classifier.batch (now 128)",
        ),
    ],
)
def test_a_full_memory_is_reported_with_the_settings_that_help(job: TrainingJob, fix: str) -> None:
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60, dtype=torch.uint8)
    asked = "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1 is free"
    for error, amount in ((full.value, f"{1 << 60} bytes"), (torch.OutOfMemoryError(asked), "2.25 GiB")):
        assert error_line(job, error) == (
            f"{job.kind}: out of memory ({amount} more were asked for): {fix}; saved steps are kept"
        )


def test_other_errors_are_reported_unchanged() -> None:
    assert error_line(job(Path("out")), ValueError("one\n  thing")) == "one thing"
    assert error_line(job(Path("out")), KeyError()) == "KeyError"
