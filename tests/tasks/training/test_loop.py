"""The training loop: exact resume, schedules, progress rows, and a loss that is not finite."""

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from functa.models.compute.batch_order import batch_rows
from functa.models.compute.randomness import mix
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.config import TrainingConfig
from functa.tasks.dispatch.progress import describe_row
from functa.tasks.trained import finished_checkpoint
from functa.tasks.training.learner import Learner, NonFiniteLoss, Run
from functa.tasks.training.loop import learning_rate, train


class Killed(BaseException):
    """Simulates SIGKILL: nothing of the loop runs after it."""


def run(path, config: TrainingConfig, kill_at: int | None = None, digest: str = "d", bad_at: int | None = None) -> Run:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(50, 4)

    def gradients(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if step == kill_at:
            raise Killed
        rows = torch.from_numpy(batch_rows(50, config.batch, 1, step))
        noise = 0.1 * torch.randn(config.batch, 4, generator=generator)
        loss = (model(x[rows] + noise) - 1).square().mean()
        if step == bad_at:
            loss = loss * float("nan")
        loss.backward()
        return {"loss": loss}

    return Run(
        stage="test", config=config, seed=3, output=open_location(str(path)),
        learner=Learner(model, torch.optim.AdamW(model.parameters(), lr=1), gradients),
        metadata={"digest": digest}, evaluate=lambda m: {"accuracy": float(m[0].weight.sum())}, evaluate_every=10,
    )  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


CONFIG = TrainingConfig(
    steps=30, batch=8, learning_rate=1e-2, warmup=5, decay="cosine", clip_norm=1.0, ema=0.9, log_every=5,
    checkpoint_seconds=1e-9,
)  # fmt: skip


@pytest.mark.parametrize("kills", [[17], [1, 2, 29], [0, 0, 15]])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(kills, tmp_path) -> None:  # type: ignore[no-untyped-def]
    train(run(tmp_path / "whole", CONFIG))
    for kill in kills:
        with pytest.raises(Killed):
            train(run(tmp_path / "killed", CONFIG, kill_at=kill))
    train(run(tmp_path / "killed", CONFIG))
    whole, killed = (load_checkpoint(open_location(str(tmp_path / name))) for name in ("whole", "killed"))
    assert whole and killed
    assert whole.tensors.keys() == killed.tensors.keys()
    for name, value in whole.tensors.items():
        np.testing.assert_array_equal(value, killed.tensors[name], err_msg=name)
    losses = [curve(tmp_path / name) for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_a_finished_run_is_recognised_with_its_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A crash may happen between the last checkpoint and the stage's record."""
    first = train(run(tmp_path, CONFIG))["weights_digest"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert train(run(tmp_path, CONFIG))["weights_digest"] == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_an_unfinished_checkpoint_is_refused_as_a_result(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StorageError, match="no thing has been trained there; run `functa make`"):
        finished_checkpoint(str(tmp_path), "thing", "make")
    with pytest.raises(Killed):
        train(run(tmp_path, CONFIG, kill_at=9))
    with pytest.raises(StorageError, match="of step 9, before training ended"):
        finished_checkpoint(str(tmp_path), "thing", "make")


def test_a_checkpoint_of_other_inputs_is_not_resumed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    train(run(tmp_path, CONFIG, digest="old"))
    other = run(tmp_path, CONFIG, digest="new", kill_at=0)
    with pytest.raises(Killed):
        train(other)
    assert load_checkpoint(open_location(str(tmp_path))) is None


@pytest.mark.faults
def test_a_loss_that_is_not_finite_stops_training_before_the_update(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NonFiniteLoss, match="step 13, so training stopped before the update"):
        train(run(tmp_path, CONFIG, bad_at=12))
    kept = load_checkpoint(open_location(str(tmp_path)))
    assert kept is not None
    assert kept.step == 12
    assert all(np.isfinite(value).all() for value in kept.tensors.values())


def test_the_average_equals_its_closed_form(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The average is average_t = ema average_{t-1} + (1 - ema) w_t, from w_0."""
    weights: list[Tensor] = []
    job = run(tmp_path, CONFIG)
    start = job.learner.model[0].weight.detach().clone()
    job.learner.optimizer.register_step_post_hook(
        lambda *_: weights.append(job.learner.model[0].weight.detach().clone())
    )
    train(job)
    expected = start
    for trained in weights:
        expected = 0.9 * expected + 0.1 * trained
    stored = load_checkpoint(open_location(str(tmp_path)))
    assert stored is not None
    np.testing.assert_allclose(stored.tensors["average.0.weight"], expected.numpy(), rtol=1e-5)


def test_the_curve_is_written_as_json_lines(tmp_path) -> None:  # type: ignore[no-untyped-def]
    train(run(tmp_path, CONFIG))
    rows = [json.loads(line) for line in io.StringIO((tmp_path / "metrics.jsonl").read_text())]
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert [("accuracy" in row) for row in rows] == [False, True, False, True, False, True]


def test_rows_are_sent_between_rows_of_the_curve_after_a_long_silence(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The first row of a slow field's curve may be half an hour away."""
    monkeypatch.setattr("functa.tasks.training.loop.SILENT_SECONDS", 0.0)
    emitted: list[dict] = []  # type: ignore[type-arg]
    job = run(tmp_path, CONFIG)
    job.emit = emitted.append
    train(job)
    assert [row["step"] for row in emitted][:3] == [2, 3, 4]  # the rate of the first would include start-up
    assert all(row["images_per_s"] > 0 and row["steps"] == 30 for row in emitted)
    assert [row["step"] for row in job.rows] == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("log_every", [5, 1])
def test_the_rate_leaves_out_the_first_step_which_includes_startup_and_compiling(  # type: ignore[no-untyped-def]
    log_every: int, tmp_path, monkeypatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("functa.tasks.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    job = run(tmp_path, CONFIG.model_copy(update={"log_every": log_every}))
    gradients = job.learner.gradients

    def slow_at_first(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        now[0] += 1000.0 if step == 0 else 2.0
        return gradients(step, generator)

    job.learner = replace(job.learner, gradients=slow_at_first)
    train(job)
    assert {row["images_per_s"] for row in job.rows if row["step"] > 1} == {8 / 2.0}
    assert not [row for row in job.rows if row["step"] == 1 and "images_per_s" in row]  # it has no rate


def test_a_row_is_described_by_step_figures_rate_and_time_left() -> None:
    row = {"step": 40, "steps": 100, "loss": 0.01, "psnr_train": 20.04, "images_per_s": 32.0}
    assert describe_row(row, ", 0:30 left") == "step 40/100, loss 0.01, training PSNR 20.04 dB, 32 images/s, 0:30 left"
    assert "training PSNR 20.04 dB, validation PSNR 19.50 dB" in describe_row(row | {"psnr": 19.5})
    assert describe_row({"step": 1, "steps": 100, "loss": 0.5}) == "step 1/100, loss 0.5"  # of the first, no rate


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup=10, decay="cosine")
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 1e-3


@given(rows=st.integers(1, 60), batch=st.integers(1, 25), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_epoch_uses_every_row_once(rows: int, batch: int, seed: int) -> None:
    seen = np.concatenate([batch_rows(rows, batch, seed, step) for step in range(3 * rows)])
    for epoch in range(len(seen) // rows):
        assert Counter(seen[epoch * rows : (epoch + 1) * rows].tolist()) == Counter(range(rows))


def test_seeds_of_neighbouring_steps_are_unrelated() -> None:
    seeds = [mix(seed, step) for seed in range(30) for step in range(30)]
    assert len(set(seeds)) == 900
    ones = np.mean([bin(a ^ b).count("1") for a, b in pairwise(seeds)])
    assert 28 < ones < 35  # of 63 bits
