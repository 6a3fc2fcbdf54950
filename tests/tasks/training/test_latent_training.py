"""Train classifiers and diffusion models on a small functaset: exact resume, exported weights, the loop of a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functa.models.latents.denoiser import build_denoiser
from functa.storage.errors import DamagedObject, StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.storage.runs.weights import SIDECAR, TENSORS, read_weights
from functa.tasks.trained import load_classifier, load_denoiser
from functa.tasks.training import diffusion, loop
from tests.helpers.storage.functasets import filled
from tests.helpers.tasks.latent_training import SETTINGS, run_training, stored_tensors, training_job

STEPS = 9


class Killed(BaseException):
    """Simulates SIGKILL: nothing of the loop runs after it."""


@pytest.fixture(scope="module")
def functaset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(filled(str(tmp_path_factory.mktemp("z"))).uri)


RESUMED = [
    *((kind, ()) for kind in SETTINGS),
    ("classifier", ("optimizer=muon", "precision=bf16")),
    ("diffusion", ("precision=bf16",)),
    pytest.param("classifier", ("compile=on",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "more"), RESUMED)
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    kind: str, more: tuple[str, ...], functaset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(training_job(kind, functaset, tmp_path / "whole", *more))
    update, kill_at = loop._update, [2, 6]

    def killed(run: Any, average: Any, step: int, *rest: Any) -> Any:
        if kill_at and step == kill_at[0]:
            kill_at.pop(0)
            raise Killed
        return update(run, average, step, *rest)

    monkeypatch.setattr(loop, "_update", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            run_training(training_job(kind, functaset, tmp_path / "killed", *more))
    run_training(training_job(kind, functaset, tmp_path / "killed", *more))
    same(tmp_path / "whole", tmp_path / "killed")


def same(one: Path, other: Path) -> None:
    whole, resumed = stored_tensors(one), stored_tensors(other)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_loop_that_runs_ahead_of_its_device_trains_the_same_weights(
    kind: str, functaset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's loop reads figures when a row is due, and uploads row numbers of many steps at once."""
    run_training(training_job(kind, functaset, tmp_path / "reading"))
    watch = loop._Watch.__init__

    def running_ahead(self: Any, run: Any) -> None:
        watch(self, run)
        self.reads_always = False

    monkeypatch.setattr(loop._Watch, "__init__", running_ahead)
    run_training(training_job(kind, functaset, tmp_path / "ahead"))
    reading, ahead = stored_tensors(tmp_path / "reading"), stored_tensors(tmp_path / "ahead")
    for name, value in reading.items():
        np.testing.assert_array_equal(ahead[name], value, err_msg=name)
    with pytest.raises(loop.NonFiniteLoss, match=r"at step 5, so training stopped before the update"):
        run_training(_with_a_bad_step(monkeypatch, training_job(kind, functaset, tmp_path / "bad", "log_every=3")))
    kept = load_checkpoint(open_location(str(tmp_path / "bad")))
    assert kept is not None and kept.step == 3  # the row before
    assert all(np.isfinite(value).all() for value in kept.tensors.values())


def _with_a_bad_step(monkeypatch: pytest.MonkeyPatch, of: Any) -> Any:
    """Make the gradient of the fifth step NaN."""
    norm, calls = torch.nn.utils.get_total_norm, [0]

    def bad(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        return norm(*args, **kwargs) * (float("nan") if calls[0] == 5 else 1.0)

    monkeypatch.setattr(loop.nn.utils, "get_total_norm", bad)
    return of


@pytest.mark.parametrize("kind", SETTINGS)
def test_exported_weights_are_the_averaged_ones_and_suffice_to_use_the_model(
    kind: str, functaset: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = []
    figures = run_training(training_job(kind, functaset, tmp_path), rows.append)
    stored, exported = stored_tensors(tmp_path), read_weights(open_location(str(tmp_path)))
    assert exported is not None
    assert {f"average.{name}" for name in exported.tensors} == {name for name in stored if name.startswith("average.")}
    for name, value in exported.tensors.items():
        np.testing.assert_array_equal(value, stored[f"average.{name}"], err_msg=name)
    meta = exported.metadata
    assert meta["weights_digest"] == figures["weights_digest"]
    assert meta["config"]["steps"] == STEPS
    assert meta["functaset"]["fingerprint"] and meta["normalizer"]["scale"]
    rates = [row for row in rows if "utilization" in row]
    assert rates and all(row["flops_per_s"] > 0 and row["utilization"] > 0 for row in rates)
    # The two exported files are enough.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (TENSORS, SIDECAR):
        (elsewhere / name).write_bytes((tmp_path / name).read_bytes())
    load = load_classifier if kind == "classifier" else load_denoiser
    model, normalizer, described = load(str(elsewhere))
    assert not model.training and described["latent_shape"] == [2, 2, 8]
    if kind == "classifier":
        assert normalizer.scale.flatten().tolist() == pytest.approx([0.05]) and normalizer.mean.abs().max() == 0
    damaged = bytearray((elsewhere / TENSORS).read_bytes())
    damaged[-1] ^= 1
    (elsewhere / TENSORS).write_bytes(bytes(damaged))
    with pytest.raises(DamagedObject, match="was altered"):
        load(str(elsewhere))


def test_ramped_averages_forget_the_start() -> None:
    from functa.tasks.config import TrainingConfig

    config = TrainingConfig(ema=0.9999, ema_ramp=True)
    assert [loop.average_decay(config, step) for step in (0, 90, 10**6)] == pytest.approx([0.1, 0.91, 0.9999])
    assert loop.average_decay(TrainingConfig(ema=0.9999), 0) == 0.9999


def test_the_inverse_square_root_starts_at_the_end_of_the_warmup() -> None:
    from functa.tasks.config import TrainingConfig

    config = TrainingConfig(steps=10**6, learning_rate=3e-4, warmup=4000, decay="inverse_sqrt")
    rates = [loop.learning_rate(config, step) for step in (0, 1999, 3999, 4000, 15_999)]
    assert rates == pytest.approx([3e-4 / 4000, 1.5e-4, 3e-4, 3e-4, 1.5e-4], rel=2e-4)
    with pytest.raises(ValueError, match="set warmup to at least 1 step"):
        TrainingConfig(decay="inverse_sqrt")


@pytest.mark.parametrize(("kind", "micro"), [*((kind, 4) for kind in SETTINGS), ("classifier", 1)])
def test_a_batch_in_parts_trains_the_same_weights(kind: str, micro: int, functaset: str, tmp_path: Path) -> None:
    """6 examples in parts of 3 and 1, without dropout, whose masks would differ."""
    plain = [] if kind == "vector" else ["model.dropout=0"]
    rows: dict[str, list[dict[str, Any]]] = {"whole": [], "parts": []}
    run_training(training_job(kind, functaset, tmp_path / "whole", *plain), rows["whole"].append)
    run_training(
        training_job(kind, functaset, tmp_path / "parts", *plain, f"micro_batch={micro}"), rows["parts"].append
    )
    whole, parts = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "parts")
    for name, value in whole.items():
        if name.startswith(("model.", "average.")):
            np.testing.assert_allclose(parts[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    assert rows["parts"][-1]["loss"] == pytest.approx(rows["whole"][-1]["loss"], rel=1e-3)


@pytest.mark.attacks
def test_a_training_of_other_inputs_starts_again_and_keeps_what_somebody_put_beside_it(
    functaset: str, tmp_path: Path
) -> None:
    job = training_job("classifier", functaset, tmp_path / "out")
    run_training(job)
    for name in ("notes.txt", "step-1.safetensors.bak", "mine.safetensors"):
        (tmp_path / "out" / name).write_text("mine")
    with open(tmp_path / "out" / "metrics.jsonl", "ab") as curve:
        curve.write(b'{"step": 9, "lo')
    run_training(job)  # a garbled line of the curve is no obstacle
    run_training(job.model_copy(update={"digest": "other inputs"}))
    for name in ("notes.txt", "step-1.safetensors.bak", "mine.safetensors"):
        assert (tmp_path / "out" / name).read_text() == "mine"
    whole = training_job("classifier", functaset, tmp_path / "whole").model_copy(update={"digest": "other inputs"})
    run_training(whole)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_checkpoint_whose_network_had_another_shape_in_an_earlier_version_is_trained_anew(
    functaset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(training_job("flow", functaset, tmp_path / "whole"))
    monkeypatch.setattr(diffusion, "build_denoiser", partial(build_denoiser, time_numbers=64))  # first multiplier 2
    run_training(training_job("flow", functaset, tmp_path / "earlier"))
    monkeypatch.undo()
    run_training(training_job("flow", functaset, tmp_path / "earlier"))
    same(tmp_path / "whole", tmp_path / "earlier")


@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
def test_a_training_switches_tf32_on_for_its_steps_alone(
    kind: str, functaset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, real = list[str](), torch.Tensor.backward

    def backward(self: torch.Tensor, *rest: Any, **more: Any) -> None:
        inside.append(torch.get_float32_matmul_precision())
        real(self, *rest, **more)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    run_training(training_job(kind, functaset, tmp_path, "precision=tf32", "steps=3"))
    assert (set(inside), torch.get_float32_matmul_precision()) == ({"high"}, "highest")


@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
def test_a_training_whose_folder_is_deleted_stops_at_its_next_checkpoint_and_does_not_make_it_anew(
    kind: str, functaset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop._update

    def deleting(run: Any, average: Any, step: int, *rest: Any) -> Any:
        if step == 4:
            (tmp_path / "out").rename(tmp_path / "deleted")
        return update(run, average, step, *rest)

    monkeypatch.setattr(loop, "_update", deleting)
    with pytest.raises(StorageError, match="out: the checkpoint of step 4 was deleted during the training"):
        run_training(training_job(kind, functaset, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run_training(training_job(kind, functaset, tmp_path / "out"))
    run_training(training_job(kind, functaset, tmp_path / "whole"))
    same(tmp_path / "whole", tmp_path / "out")
