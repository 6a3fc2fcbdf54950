"""Training in several processes of this machine: the same result as with one, and none is left when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from functa.flows.config.load import load_config
from functa.storage.config import ImagesConfig
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.dispatch import child
from functa.tasks.dispatch.child import TrainingFailed, train_in_child
from functa.tasks.training.launch import JOB
from functa.tasks.training.ranks import STORE, Ranks
from functa.tasks.training_jobs import ClassifierJob, DiffusionJob, MetaTrainJob, PixelClassifierJob, TrainingJob
from tests.helpers.storage.functasets import filled
from tests.helpers.storage.image_files import class_folders

COMMON = {"seed": 0, "device": "cpu", "digest": "d"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread, so that ranks and the single process add in the same order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not [p for p in psutil.Process().children(recursive=True) if "functa.tasks.training" in " ".join(cmdline(p))]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie: another test's child that has ended
        return []


def field_job(output: Path, devices: int, *overrides: str) -> TrainingJob:
    base = ["field.width=16", "meta_train.steps=12", "meta_train.warmup=0", "meta_train.log_every=1",
            "meta_train.validation_images=8"]  # fmt: skip
    config = load_config("digits", [*base, *overrides])
    return MetaTrainJob(
        **COMMON, images=config.images, field=config.field, inner=config.inner, meta_train=config.meta_train,
        output=str(output), devices=devices,
    )  # fmt: skip


def classifier_job(output: Path, devices: int, functaset: str) -> TrainingJob:
    sets = ["classifier.steps=6", "classifier.warmup=0", "classifier.batch=7", "classifier.model.dropout=0"]
    config = load_config("digits", sets)
    return ClassifierJob(
        **COMMON, classifier=config.classifier, functaset=functaset, classes=10, output=str(output), devices=devices
    )


def pixels_job(output: Path, devices: int) -> TrainingJob:
    sets = ["pixel_classifier.steps=3", "pixel_classifier.warmup=0", "pixel_classifier.width=16"]
    config = load_config("digits", [f"evaluation.{s}" for s in sets])
    return PixelClassifierJob(
        **COMMON, images=config.images, pixel_classifier=config.evaluation.pixel_classifier, output=str(output),
        devices=devices,
    )  # fmt: skip


def weights(output: Path) -> dict[str, np.ndarray]:
    checkpoint = load_checkpoint(open_location(str(output)))
    assert checkpoint is not None
    return {k: v for k, v in checkpoint.tensors.items() if not k.startswith("optimizer.")}


def equal_on_one_and_two(make: Callable[[Path, int], TrainingJob], folder: Path, within: float = 1e-6) -> None:
    figures = [train_in_child(make(folder / str(devices), devices), lambda _: None) for devices in (1, 2)]
    assert figures[0].keys() == figures[1].keys()
    one, two = weights(folder / "1"), weights(folder / "2")
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("meta_train.batch=15", "meta_train.micro_batch=4", "meta_train.patches_per_image=2", "meta_train.ema=0.9"),
    ],
    ids=["whole", "micro-batches-of-random-patches"],
)
@pytest.mark.slow
def test_two_processes_train_the_field_that_one_trains(overrides: tuple[str, ...], tmp_path: Path) -> None:
    equal_on_one_and_two(lambda output, devices: field_job(output, devices, *overrides), tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_classifier_that_one_trains(tmp_path: Path) -> None:
    filled(tmp_path / "z")
    # Attention does not depend on the bias of its keys: Adam amplifies rounding in a zero gradient.
    equal_on_one_and_two(lambda output, devices: classifier_job(output, devices, str(tmp_path / "z")), tmp_path, 1e-5)


@pytest.mark.slow
def test_two_processes_train_the_pixel_classifier_that_one_trains(tmp_path: Path) -> None:
    equal_on_one_and_two(pixels_job, tmp_path, 1e-5)  # gradients of biases before a group norm are nearly zero


def diffusion_job(output: Path, devices: int, functaset: str) -> TrainingJob:
    sets = ["diffusion.steps=5", "diffusion.warmup=0", "diffusion.batch=7", "diffusion.model.dropout=0"]
    config = load_config("digits", sets)
    return DiffusionJob(
        **COMMON, diffusion=config.diffusion, functaset=functaset, classes=10, output=str(output), devices=devices
    )


@pytest.mark.slow
def test_two_processes_train_the_diffusion_model_that_one_trains(tmp_path: Path) -> None:
    """Timesteps, noise and dropped labels are drawn for the whole batch."""
    filled(tmp_path / "z")
    rows: list[dict[str, Any]] = []
    equal_on_one_and_two(lambda output, devices: diffusion_job(output, devices, str(tmp_path / "z")), tmp_path, 5e-5)
    figures = train_in_child(diffusion_job(tmp_path / "again", 2, str(tmp_path / "z")), rows.append)
    assert len(figures["weights_digest"]) == 16
    assert [row["step"] for row in rows if "step" in row] == [5]  # only one process reports


def test_parts_of_a_batch_are_disjoint_and_complete_and_their_weights_add_up_to_one() -> None:
    for batch, world in ((15, 2), (16, 16), (17, 5)):
        parts = [Ranks(rank, world) for rank in range(world)]
        assert [i for ranks in parts for i in range(batch)[ranks.part(batch)]] == list(range(batch))
        assert sum(ranks.share(batch) for ranks in parts) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"a batch of 3 cannot be split over dispatch\.devices=4"):
        Ranks(0, 4).part(3)


def test_ranks_that_could_not_read_the_same_images_refuse_to_train(tmp_path: Path) -> None:
    """Each rank finds out which images are readable; if they differ, equal rows mean different images."""
    ranks = []
    everything = ImagesConfig(source="folder", location=str(class_folders(tmp_path / "all", per_class=24)))
    unreadable = open_images(everything).split("train").keys[5]
    for rank in range(2):
        seen = class_folders(tmp_path / f"seen-by-{rank}", per_class=24)
        if rank:
            (seen / unreadable).write_bytes(b"damaged")
        sets = ["images.source=folder", f"images.location={seen}", "images.max_bad_fraction=0.5"]
        job = field_job(tmp_path / "out", 2, *sets, "meta_train.validation_images=0")
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", STORE: str(tmp_path / "store"), JOB: job.model_dump_json()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-P", "-m", "functa.tasks.training"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | variables | {"PYTHONPATH": str(child.PROJECT)}, text=True,
            )
        )  # fmt: skip
    for process in ranks:
        assert process.stdin
        assert process.stdout
        *_, last = map(json.loads, process.stdout)
        assert last["error"].startswith("training processes see different training images (from 38 to 39 of")
        assert last["may_pass"]
        assert process.wait() == 1
        process.stdin.close()


def test_a_single_process_exchanges_nothing() -> None:
    figures = {"loss": torch.tensor(2.0)}
    assert Ranks().sum_up([], figures, asked=True) == (figures, True)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_reported_once_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as caught:
        train_in_child(field_job(tmp_path, 2, "meta_train.batch=1"), lambda _: None)
    assert str(caught.value) == "a batch of 1 cannot be split over dispatch.devices=2: lower it"
    assert not caught.value.may_pass


def ranks_of_the_run() -> list[psutil.Process]:
    (launcher,) = child._children
    return sorted(psutil.Process(launcher.pid).children(), key=lambda p: p.environ()["RANK"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_fails_the_run_at_once_and_leaves_no_process(rank: int, tmp_path: Path) -> None:
    killed: list[float] = []
    processes: list[psutil.Process] = []

    def kill(row: dict[str, Any]) -> None:
        if "step" in row and not killed:
            processes.extend(ranks_of_the_run())
            os.kill(processes[rank].pid, signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(TrainingFailed, match=f"^training process {rank + 1} of 2 was killed by SIGKILL$") as caught:
        train_in_child(field_job(tmp_path, 2, "meta_train.steps=1000000"), kill)
    assert caught.value.may_pass
    assert time.monotonic() - killed[0] < 30  # a second or two; it would be hours if the others were left waiting
    assert not psutil.wait_procs(processes, timeout=5)[1]


@pytest.mark.slow
def test_a_killed_rank_is_reported_at_once_even_if_a_step_takes_longer_than_the_launcher_waits(tmp_path: Path) -> None:
    """The other rank is computing when the launcher's SIGTERM arrives, which only asks it to stop."""
    killed: list[float] = []

    def kill(row: dict[str, Any]) -> None:
        if "step" in row and not killed:
            ranks_of_the_run()[1].kill()
            killed.append(time.monotonic())

    long_steps = ("field.width=256", "field.depth=8", "meta_train.batch=32", "meta_train.steps=1000000")
    with pytest.raises(TrainingFailed, match=r"^training process 2 of 2 was killed by SIGKILL$") as caught:
        train_in_child(field_job(tmp_path, 2, *long_steps, "meta_train.validation_images=0"), kill)
    assert caught.value.may_pass
    assert (
        time.monotonic() - killed[0] < 15
    )  # a step and the end of some processes; waiting for the launcher would take over 30


@pytest.mark.slow
def test_a_request_to_stop_one_rank_stops_all_after_saving_at_the_same_step(tmp_path: Path) -> None:
    def ask(row: dict[str, Any]) -> None:
        if "step" in row and not asked:
            asked.append(row["step"])
            ranks_of_the_run()[1].terminate()

    asked: list[int] = []
    with pytest.raises(TrainingFailed, match="ended with status 143"):
        train_in_child(field_job(tmp_path, 2, "meta_train.steps=1000000"), ask)
    stopped = load_checkpoint(open_location(str(tmp_path)))
    assert stopped is not None
    assert stopped.step >= asked[0]


@pytest.mark.slow
def test_an_interrupted_run_saves_and_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step", 0) >= 3:
            raise Interrupted

    def job(name: str, devices: int) -> TrainingJob:
        return field_job(tmp_path / name, devices, "meta_train.steps=40")

    with pytest.raises(Interrupted):
        train_in_child(job("broken", 2), interrupt)
    assert load_checkpoint(open_location(str(tmp_path / "broken"))) is not None
    notes: list[str] = []
    train_in_child(job("broken", 1), lambda row: notes.append(row.get("note", "")))
    train_in_child(job("whole", 1), lambda _: None)
    assert any("resumed at step" in note for note in notes)
    broken, whole = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    for name, value in whole.items():
        np.testing.assert_allclose(broken[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_ranks_listen_on_the_loopback_interface_only(tmp_path: Path) -> None:
    addresses: list[str] = []

    def look(row: dict[str, Any]) -> None:
        if "step" in row and not addresses:
            (launcher,) = child._children
            family = [psutil.Process(launcher.pid), *ranks_of_the_run()]
            addresses.extend(c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_in_child(field_job(tmp_path, 2, "meta_train.steps=1000000"), look)
    assert addresses
    assert set(addresses) == {"127.0.0.1"}
