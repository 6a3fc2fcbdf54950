"""The one training loop: step, log, evaluate, checkpoint, resume.

Randomness derives from (seed, step), so no random state is saved and a resumed run equals an uninterrupted one bit for
bit on a CPU. Each rank (tasks/training/ranks.py) runs this loop on its part of the batch; only the first evaluates,
saves and reports.
"""

import copy
import logging
import math
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn

from functa.models.compute.compilation import COMPILED, announced
from functa.models.compute.parallel import fit_threads
from functa.models.compute.randomness import mix, stage_number
from functa.tasks.config import TrainingConfig
from functa.tasks.training.checkpoints import resume, save
from functa.tasks.training.learner import NonFiniteLoss, Row, Run
from functa.tasks.training.ranks import STOPPED, RankLost

logger = logging.getLogger(__name__)

EMIT_SECONDS = 1.0  # between rows that are sent to the parent, at least

SILENT_SECONDS = 10.0  # after which a row is sent between two rows of the curve


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the rate of the update to step + 1: linear warm-up, then constant, cosine to zero, or 1 / sqrt(step).

    The last starts from the peak at the end of the warm-up: peak * sqrt(warmup / step) (App. B.1).
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
    """Return the averages' decay after the update to step + 1; the ramp lets short runs forget their start."""
    return min(config.ema, (1 + step) / (10 + step)) if config.ema_ramp else config.ema


def train(run: Run) -> dict[str, Any]:
    """Train to config.steps from the newest checkpoint of the same digest; return {weights_digest, seconds}.

    On a GPU the host reads the figures only when a row of the curve is due, and otherwise runs ahead of the device.
    """
    if run.learner.mode:
        logger.info("%s: %s", run.stage, run.learner.mode)
        if run.learner.mode.startswith(COMPILED) and run.ranks.first:
            run.emit({"note": announced(run.learner.mode)})
    if run.learner.work is not None:
        fit_threads(run.learner.work.flops, run.ranks.device)
    averages = _Averages(run)
    average = averages.module
    start = resume(run, average)
    run.ranks.check_equal(start, *run.examples)
    pace = _Pace(start, run.metadata.get("seconds", 0.0))
    run.learner.model.train()
    with _Stop() as stop:
        watch = _Watch(run)
        for step in range(start, run.config.steps):
            figures, asked = _update(run, averages, step, stop, watch)
            done, last = step + 1, step + 1 == run.config.steps
            if watch.reads_always or last or _reads(run, done):
                watch.check()
                stopping = bool(asked)
                if run.ranks.first:
                    _report(run, average, done, figures, pace)
                    if last or stopping or pace.since_save() >= run.config.checkpoint_seconds:
                        run.metadata["seconds"] = pace.seconds()
                        save(run, average, done)
                        pace.saved = time.monotonic()
                if stopping and not last:
                    raise SystemExit(STOPPED)
            if step == start:
                pace.restart(done)
                pace.started = True
    return {name: run.metadata[name] for name in ("weights_digest", "seconds")} if run.ranks.first else {}


def _update(
    run: Run, averages: "_Averages", step: int, stop: "_Stop", watch: "_Watch"
) -> tuple[dict[str, Tensor], Tensor | bool]:
    """Do one optimiser step; return its figures, and whether any rank was asked to stop."""
    seed = mix(run.seed, stage_number(run.stage), step)
    torch.manual_seed(mix(seed, run.ranks.rank) if run.ranks.rank else seed)  # dropout: another mask on every rank
    generator = torch.Generator(run.ranks.device).manual_seed(seed)
    run.learner.optimizer.zero_grad(set_to_none=True)
    parameters = run.learner.parameters
    figures = run.learner.gradients(step, generator)
    figures, asked = run.ranks.sum_up([] if run.learner.summed else parameters, figures, stop.asked)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if run.config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, run.config.clip_norm, norm)
    watch.see(step, figures["loss"], norm)
    for group in run.learner.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step) * group.get("factor", 1.0)
    run.learner.optimizer.step()
    averages.follow(1 - average_decay(run.config, step))
    return {name: value.detach() for name, value in figures.items()}, asked


class _Watch:
    """Stops training at the first loss or gradient that is not finite.

    On a CPU before that update. On a GPU, without waiting for it: its finding is read when a row is due, and nothing is
    saved in between, so the last checkpoint is from before that step in both cases.
    """

    def __init__(self, run: Run) -> None:
        self._stage = run.stage
        self.reads_always = run.ranks.device.type == "cpu"
        self._first: Tensor | None = None  # [step, loss, norm] of the first bad step; step 0: none

    def see(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Record the step if it is the first bad one."""
        loss = loss.detach()
        norm = norm.to(loss)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        row = torch.stack([bad * (step + 1.0), loss, norm])
        self._first = row if self._first is None else torch.where(self._first[0] > 0, self._first, row)
        if self.reads_always:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLoss, naming the step, if one was bad."""
        if self._first is None:
            return
        step, loss, norm = self._first.tolist()
        if step:
            raise NonFiniteLoss(
                f"{self._stage}: the loss is {loss:.3g} and its gradient's norm {norm:.3g} at step {step:.0f}, so "
                f"training stopped before the update; lower learning_rate or set clip_norm"
            )


class _Averages:
    """The averaged weights, if the run keeps any.

    Both lists are made once: walking through a deep module at every step costs as much as the optimiser.
    """

    def __init__(self, run: Run) -> None:
        self.module = copy.deepcopy(run.learner.model).requires_grad_(False) if run.config.ema else None
        self._averaged: list[Tensor] = [] if self.module is None else list(self.module.parameters())
        self._trained: list[Tensor] = list(run.learner.model.parameters())

    @torch.no_grad()
    def follow(self, weight: float) -> None:
        """Move the averages towards the weights by this fraction of the difference."""
        if self._averaged:
            torch._foreach_lerp_(self._averaged, self._trained, weight)


class _Pace:
    """The run's clock: total seconds, steps/s since the last row, seconds since the last row and checkpoint."""

    def __init__(self, step: int, seconds_before: float) -> None:
        self.begun = self.saved = self.measured = self.emitted = time.monotonic()
        self.step = step
        self.before = seconds_before
        self.started = False  # the first step is done: it includes start-up and compiling, and has no rate

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def since_save(self) -> float:
        return time.monotonic() - self.saved

    def since_emit(self) -> float:
        return time.monotonic() - self.emitted

    def restart(self, step: int) -> None:
        """Leave what happened until now out of the next rate."""
        self.step, self.measured = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        """Return the rate since the last call or restart."""
        now = time.monotonic()
        speed = (step - self.step) / max(1e-9, now - self.measured)
        self.step, self.measured = step, now
        return speed


def _report(run: Run, average: nn.Module | None, step: int, figures: dict[str, Tensor], pace: _Pace) -> None:
    """Add a row to the curve when one is due, and send rows to the parent: at most every second, at least every ten."""
    last, evaluating = step == run.config.steps, _evaluates(run, step)
    if last or evaluating or step % run.config.log_every == 0:
        row = _row(run, step, figures, pace)
        if run.evaluate is not None and evaluating:
            row |= run.evaluate(run.learner.model if average is None else average)
            pace.restart(step)  # the next rate leaves the evaluation out
        run.rows.append(row)
        send = last or pace.since_emit() >= EMIT_SECONDS
    elif send := pace.started and pace.since_emit() >= SILENT_SECONDS:
        row = _row(run, step, figures, pace)  # not in the curve: its step depends on the machine's speed
    if send:
        run.emit(row)
        pace.emitted = time.monotonic()


def _reads(run: Run, step: int) -> bool:
    """Return whether figures are read after this step: the config alone decides, so all ranks agree."""
    return step % run.config.log_every == 0 or bool(run.evaluate_every and step % run.evaluate_every == 0)


def _evaluates(run: Run, step: int) -> bool:
    if run.evaluate is None:
        return False
    return step == run.config.steps or bool(run.evaluate_every and step % run.evaluate_every == 0)


def _row(run: Run, step: int, figures: dict[str, Tensor], pace: _Pace) -> Row:
    values = {name: value.item() for name, value in figures.items()}  # on a GPU: waits until the step is done
    row = {
        "stage": run.stage, "step": step, "steps": run.config.steps, **values,
        "learning_rate": learning_rate(run.config, step - 1), "seconds": round(pace.seconds(), 2),
    }  # fmt: skip
    return row | (_rates(run, pace.steps_per_second(step)) if pace.started else {})


def _rates(run: Run, steps_per_second: float) -> Row:
    work = run.learner.work
    rates = {} if work is None else work.rates(steps_per_second)
    return {"images_per_s": round(steps_per_second * run.config.batch, 2)} | rates


class _Stop:
    """A context in which SIGTERM makes the loop save and stop at the end of the step, or when other ranks are lost."""

    asked = False

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.asked and isinstance(error, RankLost):  # the launcher sent SIGTERM because a rank died
            raise SystemExit(STOPPED) from error

    def _ask(self, *_: object) -> None:
        self.asked = True
