"""The job of a tracker's process, as it receives it on standard input. Free of the trackers' packages."""

from importlib.util import find_spec
from typing import Literal

from functa.models.config import Config
from functa.storage.errors import StorageError

Tracking = Literal["tensorboard", "mlflow", "wandb"]  # each the name of a package, and of the extra that installs it


class TrackingJob(Config):
    """The training whose curve is shown by a tracker."""

    kind: Tracking
    folder: str  # of this machine, for the tracker's files
    project: str  # name of the preset
    run: str  # name of the root
    stage: str
    output: str  # URI of the training's folder: its metrics.jsonl is followed
    digest: str  # of the training: rows of another one are not its
    settings: dict[str, str] = {}


def check_installed(kind: Tracking) -> None:
    """Raise StorageError, naming the extra, for a tracker that is not installed."""
    if find_spec(kind) is None:
        raise StorageError(f"tracking={kind} needs {kind}: pip install 'spatial-functa[{kind}]', or set tracking=null")
