"""Trackers behind one interface. Their packages are optional, and are imported by the process that uses one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from functa.tasks.dispatch.tracking.job import Tracking, TrackingJob

BATCH = 100  # settings of a request; MLflow takes no more


@dataclass(frozen=True)
class Point:
    """A row of a curve: its step, when it was measured (seconds since 1970), and its figures."""

    step: int
    time: float
    figures: dict[str, float]


class Tracker(Protocol):
    """A place where curves are shown. `run` is the tracker's own name of this training, by which it is continued."""

    run: str

    def log(self, points: Sequence[Point]) -> None:
        """Add points, in rising steps; they are kept when the call returns."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Event files in FOLDER/tensorboard/STAGE-DIGEST, which `tensorboard --logdir` shows."""

    def __init__(self, job: TrackingJob, run: str | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.run = run or f"{job.stage}-{job.digest[:8]}"
        self._writer = EventFileWriter(f"{job.folder}/tensorboard/{self.run}")

    def log(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.figures.items()]
            self._writer.add_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """Runs in FOLDER/mlruns, or on the server of MLFLOW_TRACKING_URI."""

    def __init__(self, job: TrackingJob, run: str | None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones refuse files otherwise
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = Path(job.folder, "mlruns").absolute().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder)
        if run is not None:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(job.project)
        number = self._client.create_experiment(job.project) if experiment is None else experiment.experiment_id
        self.run = self._client.create_run(number, run_name=f"{job.run} {job.stage}").info.run_id
        settings = [Param(name, value) for name, value in job.settings.items()]
        for start in range(0, len(settings), BATCH):
            self._client.log_batch(self.run, params=settings[start : start + BATCH])

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for point in points:
            metrics = [
                Metric(name, value, round(1000 * point.time), point.step) for name, value in point.figures.items()
            ]
            self._client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run)


class WandB:
    """Runs on the server that `wandb login` chose, or with WANDB_MODE=offline in FOLDER/wandb."""

    def __init__(self, job: TrackingJob, run: str | None) -> None:
        import wandb

        Path(job.folder).mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=job.project, group=job.run, name=f"{job.run} {job.stage}", job_type=job.stage, dir=job.folder,
            id=run, resume="allow", config=job.settings, settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.run = self._run.id

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(point.figures, step=point.step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[Tracking, Callable[[TrackingJob, str | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
