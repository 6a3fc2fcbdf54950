"""Save a training run's checkpoints and curve, and resume from them."""

import json
import logging
from typing import Any

import torch
from torch import nn

from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import (
    has_checkpoint,
    is_checkpoint,
    load_checkpoint,
    newest_metadata,
    save_checkpoint,
)
from functa.storage.runs.curve import CURVE, read_curve
from functa.storage.runs.weights import WEIGHTS, write_weights
from functa.tasks.trained import best_weights, tensors_below, weights_digest
from functa.tasks.training.learner import Row, Run
from functa.tasks.training_jobs import TrainingJob

logger = logging.getLogger(__name__)


def save(run: Run, average: nn.Module | None, step: int) -> None:
    """Write a checkpoint of weights, averages and optimiser, and the curve so far. Only the first rank calls it.

    Raises StorageError where the one before was deleted: with the root, it may be, which is not to be made anew.
    """
    if run.saved is not None and not has_checkpoint(run.output, run.saved):
        raise StorageError(
            f"{run.output.uri}: the checkpoint of step {run.saved} was deleted during the training, which stopped; "
            f"run the same command again"
        )
    tensors = {f"model.{k}": v for k, v in run.learner.model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in run.learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    arrays = {k: v.detach().cpu().numpy() for k, v in tensors.items()}
    finished = step == run.config.steps
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    run.output.write(CURVE, lines.encode())  # before the checkpoint: the curve may have more steps, never fewer
    if finished:
        run.metadata["weights_digest"] = weights_digest(arrays)
        described = {"stage": run.stage, "step": step, "config": run.config.model_dump(mode="json")}
        exported = {name: value.numpy() for name, value in best_weights(arrays).items()}
        write_weights(run.output, exported, described | run.metadata)
    save_checkpoint(run.output, step, arrays, run.metadata | {"finished": finished})
    run.saved = step


def begun(job: TrainingJob) -> dict[str, Any] | None:
    """Return the metadata of the checkpoint that the job continues from, None if it begins."""
    found = newest_metadata(open_location(job.output))
    return found if found is not None and found.get("digest") == job.digest else None


def resume(run: Run, average: nn.Module | None) -> int:
    """Load the newest checkpoint of this digest; return its step. Checkpoints of another digest are deleted."""
    checkpoint = load_checkpoint(run.output)
    if checkpoint is None:
        return 0
    tensors = {k: torch.from_numpy(v) for k, v in checkpoint.tensors.items()}
    if checkpoint.metadata.get("digest") != run.metadata["digest"] or not _fits(run, tensors):
        if run.ranks.first:
            _start_again(run)
        return 0
    run.learner.model.load_state_dict(tensors_below(tensors, "model."))
    if average is not None:
        average.load_state_dict(tensors_below(tensors, "average."))
    state = run.learner.optimizer.state_dict()
    for key, value in tensors_below(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        state["state"].setdefault(int(index), {})[name] = value
    run.learner.optimizer.load_state_dict(state)
    run.rows[:] = _rows_until(run.output, checkpoint.step)
    run.saved = checkpoint.step
    run.metadata |= {k: v for k, v in checkpoint.metadata.items() if k in ("seconds", "weights_digest")}
    logger.info("%s: resumed at step %d of %d", run.stage, checkpoint.step, run.config.steps)
    return checkpoint.step


def _fits(run: Run, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the model has these shapes; of one config it may have had others in an earlier version."""
    stored = {name: value.shape for name, value in tensors_below(tensors, "model.").items()}
    return stored == {name: value.shape for name, value in run.learner.model.state_dict().items()}


def _start_again(run: Run) -> None:
    logger.warning("%s: inputs have changed since its checkpoint was written; training starts again", run.stage)
    for key in run.output.list():
        if is_checkpoint(key) or key in (CURVE, *WEIGHTS):  # somebody may keep other files beside them
            run.output.delete(key)


def _rows_until(output: Location, step: int) -> list[Row]:
    """Return the curve's rows up to a step: later rows belong to steps that are computed again."""
    return [row for row in read_curve(output) if row["step"] <= step]
