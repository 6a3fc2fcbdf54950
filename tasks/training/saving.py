"""A training run's checkpoints and curve: written, resumed from, and read once it has finished."""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from storage.errors import StorageError
from storage.locations import Location, open_location
from storage.weights import read_description, read_weights, write_weights
from tasks.training.run import Row, Run

logger = logging.getLogger(__name__)

CURVE = "metrics.jsonl"


def save(run: Run, average: nn.Module | None, step: int) -> None:
    """Writes a checkpoint of weights, average and optimiser, and the curve so far. For the first rank alone."""
    tensors = {f"model.{k}": v for k, v in run.module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    arrays = {k: v.detach().cpu().numpy() for k, v in tensors.items()}
    finished = step == run.config.steps
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    run.output.write(CURVE, lines.encode())  # before the checkpoint: it may know more steps, never fewer
    if finished:
        run.metadata["weights_digest"] = weights_digest(arrays)
        described = {"stage": run.stage, "step": step, "config": run.config.model_dump(mode="json")}
        exported = {name: value.numpy() for name, value in best_weights(arrays).items()}
        write_weights(run.output, exported, described | run.metadata)
    save_checkpoint(run.output, step, arrays, run.metadata | {"finished": finished})


def resume(run: Run, average: nn.Module | None) -> int:
    """Loads the newest checkpoint of this digest; returns the step to go on from. Another digest's are removed."""
    checkpoint = load_checkpoint(run.output)
    if checkpoint is None:
        return 0
    if checkpoint.metadata.get("digest") != run.metadata["digest"]:
        if run.ranks.first:
            _start_anew(run)
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


def _start_anew(run: Run) -> None:
    logger.warning("%s: inputs changed since its checkpoint was written; training starts anew", run.stage)
    for key in run.output.list():
        run.output.delete(key)


def _rows_until(output: Location, step: int) -> list[Row]:
    """The curve's rows up to a step: what a later, lost leg wrote is not part of this run."""
    if not output.exists(CURVE):
        return []
    rows = [json.loads(line) for line in output.read(CURVE).decode().splitlines()]
    return [row for row in rows if row["step"] <= step]


def weights_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of the weights that will be used, by name, shape and bytes."""
    state = hashlib.sha256()
    for name, value in sorted(best_weights(tensors).items()):
        state.update(f"{name}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def best_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint where there are some, else the plain ones."""
    prefix = "average." if any(k.startswith("average.") for k in tensors) else "model."
    return _under({k: torch.from_numpy(v) for k, v in tensors.items()}, prefix)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def trained_weights(uri: str, what: str, command: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights that are to be used, what they are) of a finished training: averaged ones where there are some.

    From the exported file, which is all that must be copied to use a model elsewhere; from the checkpoint where a
    training left none. Raises StorageError, naming the command to run, where there is neither.
    """
    exported = read_weights(open_location(uri))
    if exported is not None:
        return {name: torch.from_numpy(value) for name, value in exported.tensors.items()}, exported.metadata
    checkpoint = finished_checkpoint(uri, what, command)
    return best_weights(checkpoint.tensors), dict(checkpoint.metadata)


def trained_description(uri: str, what: str, command: str) -> dict[str, Any]:
    """What trained_weights says of them, without reading them where they were exported."""
    described = read_description(open_location(uri))
    return dict(finished_checkpoint(uri, what, command).metadata) if described is None else described


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
