"""Trackers show what metrics.jsonl holds, each point once; whatever becomes of them, the training goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.tasks.dispatch.tracking import following
from functa.tasks.dispatch.tracking.following import tracked
from functa.tasks.dispatch.tracking.job import Tracking, TrackingJob, check_installed
from functa.tasks.dispatch.tracking.trackers import TRACKERS


def job(folder: Path, kind: Tracking, digest: str = "0123456789abcdef") -> TrackingJob:
    return TrackingJob(
        kind=kind, folder=str(folder / "tracking"), project="digits", run="root", stage="meta_train",
        output=str(folder / "field"), digest=digest, settings={"meta_train.steps": "40", "field.width": "32"},
    )  # fmt: skip


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"stage": "meta_train", "step": step, "steps": 40, "loss": 1 / step, "psnr": 20 + step / 8, "seconds": step / 9}
        for step in range(start, stop, 10)
    ]  # fmt: skip


def train(folder: Path, curve: list[dict[str, Any]], digest: str = "0123456789abcdef") -> None:
    """Leave what a training does: the curve, then a checkpoint."""
    location = open_location(str(folder / "field"))
    for key in location.list("step-"):  # of another training, or older
        location.delete(key)
    location.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in curve).encode())
    save_checkpoint(location, curve[-1]["step"], {"w": np.zeros(1, np.float32)}, {"digest": digest})


def follow(folder: Path, kind: Tracking, curve: list[dict[str, Any]], **options: Any) -> list[str]:
    """Train beside a tracker; return the warnings."""
    warnings: list[str] = []
    with tracked(job(folder, kind, **options), warnings.append):
        train(folder, curve, **options)
    return warnings


def tensorboard_curves(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return (step, value) of each curve of each run, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for run in sorted((folder / "tracking/tensorboard").iterdir()):
        events = EventAccumulator(str(run)).Reload()
        found[run.name] = {
            tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
    return found


def expected(curve: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    return {name: [(row["step"], pytest.approx(row[name])) for row in curve] for name in ("loss", "psnr")}


def test_tensorboard_shows_the_curve_and_continues_it(tmp_path: Path) -> None:
    assert follow(tmp_path, "tensorboard", rows(10, 30)) == []
    assert follow(tmp_path, "tensorboard", rows(10, 50)) == []  # continued: the first two are there
    assert tensorboard_curves(tmp_path) == {"meta_train-01234567": expected(rows(10, 50))}


def test_another_training_is_another_run_without_rows_of_the_first(tmp_path: Path) -> None:
    follow(tmp_path, "tensorboard", rows(10, 50))
    with tracked(job(tmp_path, "tensorboard", "fedcba9876543210"), pytest.fail):
        time.sleep(0.1)  # the first one's curve is still there
    follow(tmp_path, "tensorboard", rows(10, 20), digest="fedcba9876543210")
    assert tensorboard_curves(tmp_path) == {
        "meta_train-01234567": expected(rows(10, 50)), "meta_train-fedcba98": expected(rows(10, 20)),
    }  # fmt: skip


def test_mlflow_shows_curve_and_settings_and_continues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    for stop in (30, 50):
        assert follow(tmp_path, "mlflow", rows(10, stop)) == []
    client = MlflowClient((tmp_path / "tracking/mlruns").as_uri())
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("root meta_train", "FINISHED")
    assert run.data.params == {"meta_train.steps": "40", "field.width": "32"}
    found = {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in ("loss", "psnr")
    }
    assert found == expected(rows(10, 50))


def test_wandb_writes_the_curve_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(tmp_path, "wandb", rows(10, 50)) == []
    (file,) = (tmp_path / "tracking/wandb").glob("offline-run-*/*.wandb")
    data = file.read_bytes()
    for word in (b"loss", b"psnr", b"meta_train.steps"):
        assert word in data


@pytest.mark.faults
@pytest.mark.parametrize(
    ("code", "warning"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
        ("import sys; sys.exit('no such server')", "no such server"),
        ("import time; time.sleep(600)", "did not end within 1 s and was stopped"),
        ("import sys; sys.stdin.close(); sys.stderr.write('a' * 10**6); sys.exit(1)", "aaa"),
    ],
)
def test_a_tracker_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, warning: str
) -> None:
    monkeypatch.setattr(following, "COMMAND", [sys.executable, "-c", code])
    monkeypatch.setattr(following, "FINISH_SECONDS", 1.0 if "sleep" in code else 60.0)
    (line,) = follow(tmp_path, "tensorboard", rows(10, 50))
    assert line.startswith("tracking=tensorboard: ")
    assert warning in line
    assert line.endswith("/metrics.jsonl")


@pytest.mark.faults
def test_a_tracker_that_cannot_be_started_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "COMMAND", ["/nonexistent/python"])
    (line,) = follow(tmp_path, "tensorboard", rows(10, 50))
    assert "could not be started (No such file or directory)" in line


@pytest.mark.faults
def test_the_error_of_a_training_is_not_hidden_and_its_rows_are_sent(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracked(job(tmp_path, "tensorboard"), pytest.fail):
        train(tmp_path, rows(10, 30))
        raise ZeroDivisionError
    assert tensorboard_curves(tmp_path) == {"meta_train-01234567": expected(rows(10, 30))}


def test_without_a_tracker_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "COMMAND", ["/nonexistent/python"])
    with tracked(None, pytest.fail):
        pass


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    kind: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed(kind)
    monkeypatch.setattr("functa.tasks.dispatch.tracking.job.find_spec", lambda name: None)
    with pytest.raises(StorageError, match=rf"tracking={kind} needs {kind}: pip install 'spatial-functa\[{kind}\]'"):
        check_installed(kind)


def test_no_tracker_is_imported_by_what_starts_one() -> None:
    code = (
        "import sys, functa.tasks.dispatch.tracking.following, functa.tasks.dispatch.tracking.trackers; "
        "print({'tensorboard', 'mlflow', 'wandb', 'torch'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
