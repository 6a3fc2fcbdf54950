"""The one training loop: step, log, evaluate, checkpoint, resume.

Randomness derives from (seed, step), so nothing about random state is saved and a resumed run equals an
uninterrupted one bit for bit on a CPU. Ranks (tasks/training/ranks.py) each run this loop on their part of the batch;
the first alone evaluates, saves and speaks.
"""

import copy
import math
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tasks.config import TrainingConfig
from tasks.training.ranks import STOPPED, RankLost
from tasks.training.run import NonFiniteLoss, Row, Run
from tasks.training.saving import resume, save
from tasks.training.seeds import mix, stage_number

EMIT_SECONDS = 1.0  # at most one row reaches the parent in this time
SILENT_SECONDS = 10.0  # and after so long without one the loop speaks between two lines of the curve


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of the update that makes step + 1: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(run: Run) -> Mapping[str, Any]:
    """Trains to config.steps from wherever the newest checkpoint of the same digest stands; returns its metadata."""
    average = _average(run)
    start = resume(run, average)
    run.ranks.check_equal(start, *run.examples)
    pace = _Pace(start, run.metadata.get("seconds", 0.0))
    with _Stop() as stop:
        for step in range(start, run.config.steps):
            figures, stopping = _update(run, average, step, stop)
            done, last = step + 1, step + 1 == run.config.steps
            if run.ranks.first:
                _tell(run, average, done, figures, pace)
                if last or stopping or pace.since_save() >= run.config.checkpoint_seconds:
                    run.metadata["seconds"] = pace.seconds()
                    save(run, average, done)
                    pace.saved = time.monotonic()
            if stopping and not last:
                raise SystemExit(STOPPED)
    return run.metadata


def _update(run: Run, average: nn.Module | None, step: int, stop: "_Stop") -> tuple[dict[str, Tensor], bool]:
    """One optimiser step; its figures, and whether any rank was asked to stop."""
    seed = mix(run.seed, stage_number(run.stage), step)
    torch.manual_seed(mix(seed, run.ranks.rank) if run.ranks.rank else seed)  # dropout: another mask on every rank
    generator = torch.Generator().manual_seed(seed)
    run.optimizer.zero_grad(set_to_none=True)
    parameters = run.parameters
    figures = run.gradients(step, generator)
    figures, stopping = run.ranks.sum_up(parameters, figures, stop.asked)
    loss = figures["loss"]
    norm = nn.utils.clip_grad_norm_(parameters, run.config.clip_norm or math.inf)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise NonFiniteLoss(
            f"{run.stage}: the loss is {loss.item():.3g} and its gradient's norm {norm.item():.3g} at step {step + 1}, "
            f"so training stopped before the update; lower learning_rate or set clip_norm"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step) * group.get("factor", 1.0)
    run.optimizer.step()
    if average is not None:
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(run.module.parameters()), 1 - run.config.ema)
    return {name: value.detach() for name, value in figures.items()}, stopping


def _average(run: Run) -> nn.Module | None:
    if not run.config.ema:
        return None
    return copy.deepcopy(run.module).requires_grad_(False)


class _Pace:
    """The run's clock: seconds in all, images/s since the last row, seconds since the last row and checkpoint."""

    def __init__(self, step: int, seconds_before: float) -> None:
        self.begun = self.saved = self.measured = self.emitted = time.monotonic()
        self.step = step
        self.before = seconds_before

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def since_save(self) -> float:
        return time.monotonic() - self.saved

    def since_emit(self) -> float:
        return time.monotonic() - self.emitted

    def steps_per_second(self, step: int) -> float:
        """Since it was last asked: a mean over the run would carry the compiler's minute along for hours."""
        now = time.monotonic()
        speed = (step - self.step) / max(1e-9, now - self.measured)
        self.step, self.measured = step, now
        return speed


def _tell(run: Run, average: nn.Module | None, step: int, figures: dict[str, Tensor], pace: _Pace) -> None:
    """A row for the curve when one is due, emitted at most every second; a passing word after a long silence."""
    last = step == run.config.steps
    evaluating = run.evaluate is not None and (last or (run.evaluate_every and step % run.evaluate_every == 0))
    if last or evaluating or step % run.config.log_every == 0:
        row = _row(run, step, figures, pace)
        if run.evaluate is not None and evaluating:
            row |= run.evaluate(run.module if average is None else average)
            pace.measured = time.monotonic()  # the next rate leaves the evaluation out
        run.rows.append(row)
        speak = last or pace.since_emit() >= EMIT_SECONDS
    elif speak := pace.since_emit() >= SILENT_SECONDS:
        row = _row(run, step, figures, pace)  # of no curve: when it comes depends on the machine
    if speak:
        run.emit(row)
        pace.emitted = time.monotonic()


def _row(run: Run, step: int, figures: dict[str, Tensor], pace: _Pace) -> Row:
    return {
        "stage": run.stage, "step": step, "steps": run.config.steps,
        **{name: value.item() for name, value in figures.items()},
        "learning_rate": learning_rate(run.config, step - 1),
        "images_per_s": round(pace.steps_per_second(step) * run.config.batch, 2), "seconds": round(pace.seconds(), 2),
    }  # fmt: skip


class _Stop:
    """Within, SIGTERM asks the loop to save and stop at the end of the step, or where the other ranks are lost."""

    asked = False

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.asked and isinstance(error, RankLost):  # the launcher asked because a rank died: nothing to wait for
            raise SystemExit(STOPPED) from error

    def _ask(self, *_: object) -> None:
        self.asked = True
