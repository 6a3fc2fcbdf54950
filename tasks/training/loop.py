"""The one training loop: step, log, evaluate, checkpoint, resume.

Randomness derives from (seed, step), so nothing about random state is saved and a resumed run equals an
uninterrupted one bit for bit on a CPU.
"""

import copy
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from storage.errors import StorageError
from storage.locations import Location, open_location
from tasks.config import TrainingConfig

logger = logging.getLogger(__name__)

CURVE = "metrics.jsonl"
Row = dict[str, Any]
Emit = Callable[[Row], None]


class NonFiniteLoss(Exception):
    """The loss or its gradient is NaN or infinite; the last good checkpoint stands."""


@dataclass
class Run:
    """What the loop needs to know of one training run."""

    stage: str  # its name in logs, rows and seeds
    config: TrainingConfig
    seed: int
    module: nn.Module
    # Adds the step's gradients to the parameters and returns the loss, a scalar tensor on the module's device.
    gradients: Callable[[int, torch.Generator], Tensor]
    optimizer: torch.optim.Optimizer
    output: Location
    metadata: dict[str, Any]  # stored in every checkpoint; its "digest" tells whose checkpoint it is
    emit: Emit = lambda row: None
    # Called with the module to judge (the average, where there is one) -> figures such as {"accuracy": .97}.
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    evaluate_every: int = 0
    row_every_seconds: float = 1.0
    rows: list[Row] = field(default_factory=list)


def mix(*numbers: int) -> int:
    """A 63-bit seed of several integers: SplitMix64's finaliser over a running sum; no hash() of Python's."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def stage_number(stage: str) -> int:
    """Stages of one seed draw from different streams."""
    return int.from_bytes(stage.encode()[:7], "big")


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of the update that makes step + 1: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def batch_rows(rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The step's rows: epochs of a fresh permutation each, cut into batches that may span two epochs."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    epochs, places = np.divmod(wanted, rows)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _order(rows, seed, int(epoch))[places[here]]
    return chosen


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(mix(seed, epoch))).permutation(rows)


def train(run: Run) -> Mapping[str, Any]:
    """Trains to config.steps from wherever the newest checkpoint of the same digest stands; returns its metadata."""
    average = _average(run)
    start = _resume(run, average)
    pace = _Pace(start, run.metadata.get("seconds", 0.0))
    with _Stop() as stop:
        for step in range(start, run.config.steps):
            loss = _update(run, average, step)
            done, last = step + 1, step + 1 == run.config.steps
            if last or done % run.config.log_every == 0 or _evaluation_due(run, done):
                _log(run, average, done, loss, pace)
            if last or stop.asked or pace.since_save() >= run.config.checkpoint_seconds:
                run.metadata["seconds"] = pace.seconds()
                _save(run, average, done)
                pace.saved = time.monotonic()
            if stop.asked and not last:
                raise SystemExit(128 + signal.SIGTERM)
    return run.metadata


def _evaluation_due(run: Run, step: int) -> bool:
    return bool(run.evaluate and run.evaluate_every and step % run.evaluate_every == 0)


class _Pace:
    """The run's clock: seconds in all, images/s since the last row, seconds since the last checkpoint."""

    def __init__(self, step: int, seconds_before: float) -> None:
        self.begun = self.saved = self.logged = self.emitted = time.monotonic()
        self.step = step
        self.before = seconds_before

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def since_save(self) -> float:
        return time.monotonic() - self.saved

    def steps_per_second(self, step: int) -> float:
        # Since the last row: a mean over the run would carry the compiler's minute along for hours.
        return (step - self.step) / max(1e-9, time.monotonic() - self.logged)


def _log(run: Run, average: nn.Module | None, step: int, loss: Tensor, pace: _Pace) -> None:
    """A row for the curve, with the evaluation's figures when one is due; emitted at most every second."""
    last = step == run.config.steps
    speed = pace.steps_per_second(step) * run.config.batch
    row = {
        "stage": run.stage, "step": step, "steps": run.config.steps, "loss": loss.item(),
        "learning_rate": learning_rate(run.config, step - 1), "images_per_s": round(speed, 2),
        "seconds": round(pace.seconds(), 2),
    }  # fmt: skip
    if run.evaluate and (last or _evaluation_due(run, step)):
        row |= run.evaluate(_judged(run, average))
    run.rows.append(row)
    pace.step, pace.logged = step, time.monotonic()
    if last or pace.logged - pace.emitted >= run.row_every_seconds:
        run.emit(row)
        pace.emitted = pace.logged


def _update(run: Run, average: nn.Module | None, step: int) -> Tensor:
    seed = mix(run.seed, stage_number(run.stage), step)
    torch.manual_seed(seed)  # dropout
    generator = torch.Generator().manual_seed(seed)
    run.optimizer.zero_grad(set_to_none=True)
    loss = run.gradients(step, generator)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.config.clip_norm or math.inf)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise NonFiniteLoss(
            f"{run.stage}: the loss is {loss.item():.3g} and its gradient's norm {norm.item():.3g} at step {step + 1}, "
            f"so training stopped before the update; lower learning_rate or set clip_norm"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    run.optimizer.step()
    if average is not None:
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(run.module.parameters()), 1 - run.config.ema)
    return loss.detach()


def _average(run: Run) -> nn.Module | None:
    if not run.config.ema:
        return None
    return copy.deepcopy(run.module).requires_grad_(False)


def _judged(run: Run, average: nn.Module | None) -> nn.Module:
    return run.module if average is None else average


def _save(run: Run, average: nn.Module | None, step: int) -> None:
    tensors = {f"model.{k}": v for k, v in run.module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    arrays = {k: v.detach().cpu().numpy() for k, v in tensors.items()}
    finished = step == run.config.steps
    if finished:
        run.metadata["weights_digest"] = weights_digest(arrays)
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    run.output.write(CURVE, lines.encode())  # before the checkpoint: it may know more steps, never fewer
    save_checkpoint(run.output, step, arrays, run.metadata | {"finished": finished})


def _resume(run: Run, average: nn.Module | None) -> int:
    """Loads the newest checkpoint of this digest; returns the step to go on from. Another digest's are removed."""
    checkpoint = load_checkpoint(run.output)
    if checkpoint is None:
        return 0
    if checkpoint.metadata.get("digest") != run.metadata["digest"]:
        logger.warning("%s: inputs changed since its checkpoint was written; training starts anew", run.stage)
        for key in run.output.list():
            run.output.delete(key)
        return 0
    tensors = {k: torch.from_numpy(v) for k, v in checkpoint.tensors.items()}
    run.module.load_state_dict(_under(tensors, "model."))
    if average is not None:
        average.load_state_dict(_under(tensors, "average."))
    state = run.optimizer.state_dict()
    for key, value in _under(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        state["state"].setdefault(int(index), {})[name] = value
    run.optimizer.load_state_dict(state)
    run.rows[:] = _rows_until(run.output, checkpoint.step)
    run.metadata |= {k: v for k, v in checkpoint.metadata.items() if k in ("seconds", "weights_digest")}
    logger.info("%s: resumed at step %d of %d", run.stage, checkpoint.step, run.config.steps)
    return checkpoint.step


def weights_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of the weights that will be used, by name, shape and bytes."""
    state = hashlib.sha256()
    for name, value in sorted(best_weights(tensors).items()):
        state.update(f"{name}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def _rows_until(output: Location, step: int) -> list[Row]:
    """The curve's rows up to a step: what a later, lost leg wrote is not part of this run."""
    if not output.exists(CURVE):
        return []
    rows = [json.loads(line) for line in output.read(CURVE).decode().splitlines()]
    return [row for row in rows if row["step"] <= step]


def finished_checkpoint(uri: str, what: str, command: str) -> Checkpoint:
    """The checkpoint of a finished run. Raises StorageError, naming the command to run, where there is none."""
    checkpoint = load_checkpoint(open_location(uri))
    if checkpoint is None:
        raise StorageError(f"{uri}: no {what} has been trained there; run `functa {command}` first")
    if not checkpoint.metadata.get("finished"):
        raise StorageError(
            f"{uri}: the newest valid checkpoint of the {what} is of step {checkpoint.step}, before training ended; "
            f"delete damaged checkpoints after it, if any, and run `functa {command}` again"
        )
    return checkpoint


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def best_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint where there are some, else the plain ones."""
    prefix = "average." if any(k.startswith("average.") for k in tensors) else "model."
    return _under({k: torch.from_numpy(v) for k, v in tensors.items()}, prefix)


class _Stop:
    """Within, SIGTERM asks the loop to save and stop at the end of the step."""

    asked = False

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
