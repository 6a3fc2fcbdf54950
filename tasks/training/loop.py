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

from functa.models.compute.randomness import mix, stage_number
from functa.tasks.config import TrainingConfig
from functa.tasks.training.checkpoints import resume, save
from functa.tasks.training.ranks import STOPPED, RankLost
from functa.tasks.training.run import NonFiniteLoss, Row, Run

EMIT_SECONDS = 1.0  # at most one row reaches the parent in this time

SILENT_SECONDS = 10.0  # and after so long without one the loop speaks between two lines of the curve


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of the update that makes step + 1: linear warm-up, then constant, cosine to zero, or falling as 1 / sqrt(step).

    The last goes on from the peak at the end of the warm-up, peak * sqrt(warmup / step) (App. B.1).
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    if config.decay == "inverse_sqrt":
        return config.learning_rate * math.sqrt(max(1, config.warmup) / (step + 1))
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def average_decay(config: TrainingConfig, step: int) -> float:
    """Of the averaged weights after the update that makes step + 1; ramped: so that short runs forget their start."""
    return min(config.ema, (1 + step) / (10 + step)) if config.ema_ramp else config.ema


def train(run: Run) -> Mapping[str, Any]:
    """Trains to config.steps from wherever the newest checkpoint of the same digest stands; returns its metadata.

    On a GPU the host looks at the figures when a line of the curve is due, and else runs ahead of the device.
    """
    averages = _Averages(run)
    average = averages.module
    start = resume(run, average)
    run.ranks.check_equal(start, *run.examples)
    pace = _Pace(start, run.metadata.get("seconds", 0.0))
    run.module.train()
    with _Stop() as stop:
        watch = _Watch(run)
        for step in range(start, run.config.steps):
            figures, asked = _update(run, averages, step, stop, watch)
            done, last = step + 1, step + 1 == run.config.steps
            if not (watch.looks_always or last or _looks(run, done)):
                continue
            watch.check()
            stopping = bool(asked)
            if run.ranks.first:
                _tell(run, average, done, figures, pace)
                if last or stopping or pace.since_save() >= run.config.checkpoint_seconds:
                    run.metadata["seconds"] = pace.seconds()
                    save(run, average, done)
                    pace.saved = time.monotonic()
            if stopping and not last:
                raise SystemExit(STOPPED)
    return run.metadata


def _update(
    run: Run, averages: "_Averages", step: int, stop: "_Stop", watch: "_Watch"
) -> tuple[dict[str, Tensor], Tensor | bool]:
    """One optimiser step; its figures, and whether any rank was asked to stop."""
    seed = mix(run.seed, stage_number(run.stage), step)
    torch.manual_seed(mix(seed, run.ranks.rank) if run.ranks.rank else seed)  # dropout: another mask on every rank
    generator = torch.Generator(run.ranks.device).manual_seed(seed)
    run.optimizer.zero_grad(set_to_none=True)
    parameters = run.parameters
    figures = run.gradients(step, generator)
    figures, asked = run.ranks.sum_up(parameters, figures, stop.asked)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if run.config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, run.config.clip_norm, norm)
    watch.see(step, figures["loss"], norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step) * group.get("factor", 1.0)
    run.optimizer.step()
    averages.follow(1 - average_decay(run.config, step))
    return {name: value.detach() for name, value in figures.items()}, asked


class _Watch:
    """Stops training at the first loss or gradient that is no number.

    On a CPU before that update. A GPU is not waited for: what it saw is read when a line is due, and nothing is saved
    in between, so the last checkpoint is of before that step either way.
    """

    def __init__(self, run: Run) -> None:
        self._stage = run.stage
        self.looks_always = run.ranks.device.type == "cpu"
        self._first: Tensor | None = None  # [step, loss, norm] of the first bad one; step 0: none was

    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Notes the step, if it is bad and the first one that is."""
        loss = loss.detach()
        norm = norm.to(loss)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        row = torch.stack([bad * (step + 1.0), loss, norm])
        self._first = row if self._first is None else torch.where(self._first[0] > 0, self._first, row)
        if self.looks_always:
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLoss, naming the step, where one was bad."""
        if self._first is None:
            return
        step, loss, norm = self._first.tolist()
        if step:
            raise NonFiniteLoss(
                f"{self._stage}: the loss is {loss:.3g} and its gradient's norm {norm:.3g} at step {step:.0f}, so "
                f"training stopped before the update; lower learning_rate or set clip_norm"
            )


class _Averages:
    """The averaged weights, where the run wants them.

    Both lists are made once: to walk through a deep module at every step costs as much as its optimiser.
    """

    def __init__(self, run: Run) -> None:
        self.module = copy.deepcopy(run.module).requires_grad_(False) if run.config.ema else None
        self._averaged = [] if self.module is None else list(self.module.parameters())
        self._trained = list(run.module.parameters())

    @torch.no_grad()
    def follow(self, weight: float) -> None:
        """Moves the averages by this share of their way to the weights."""
        if self._averaged:
            torch._foreach_lerp_(self._averaged, self._trained, weight)


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
    last, evaluating = step == run.config.steps, _evaluates(run, step)
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


def _looks(run: Run, step: int) -> bool:
    """Whether figures are read after this step: decided by config alone, so by all ranks alike."""
    return step % run.config.log_every == 0 or bool(run.evaluate_every and step % run.evaluate_every == 0)


def _evaluates(run: Run, step: int) -> bool:
    if run.evaluate is None:
        return False
    return step == run.config.steps or bool(run.evaluate_every and step % run.evaluate_every == 0)


def _row(run: Run, step: int, figures: dict[str, Tensor], pace: _Pace) -> Row:
    told = {name: value.item() for name, value in figures.items()}  # on a GPU: waits until the step is done
    speed = pace.steps_per_second(step)
    row = {
        "stage": run.stage, "step": step, "steps": run.config.steps, **told,
        "learning_rate": learning_rate(run.config, step - 1),
        "images_per_s": round(speed * run.config.batch, 2), "seconds": round(pace.seconds(), 2),
    }  # fmt: skip
    return row | (run.work.rates(speed) if run.work is not None else {})


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
