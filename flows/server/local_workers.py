"""The workers that `functa up` starts on this machine: their devices, threads, and where they may read and write."""

import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from functa.flows.config.schema import ConfigError
from functa.flows.server.api import POOL, absolute
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.places.allowed import ALLOWED_ROOTS, read_places
from functa.storage.places.reused import was_allowed

if TYPE_CHECKING:
    from functa.flows.config.schema import PipelineConfig

PYTHON = [sys.executable, "-P", "-m"]  # -P: no module is taken from the current folder

PREFECT = [*PYTHON, "prefect", "--no-prompt"]


@dataclass(frozen=True)
class Worker:
    """A process that takes runs of one queue. device: what it sees as CUDA_VISIBLE_DEVICES; None: what we see."""

    name: str
    queue: str
    limit: int | None = None
    device: str | None = None
    threads: int | None = None

    def command(self) -> list[str]:
        """Return the command of Prefect's own worker, which starts a process for each run."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        queue = ["--pool", POOL, "--work-queue", self.queue, "--type", "process", "--install-policy", "never"]
        return [*PREFECT, "worker", "start", "--name", self.name, *queue, *limit]

    def environment(self) -> dict[str, str]:
        """Return the environment variables that limit its runs to their share of the machine."""
        device = {} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device}
        return device | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})


def workers_of_this_machine(port: int, gpus: int | None) -> list[Worker]:
    """Return a worker for pipelines, without a limit as they only wait, and one for each device, limited to one run.

    Raises ConfigError where more devices are asked for than there are.
    """
    from functa.tasks.dispatch.child import threads_of_a_run
    from functa.tasks.dispatch.dask_cluster import visible_devices

    devices = visible_devices()
    count = max(1, len(devices)) if gpus is None else gpus
    if count < 1:
        raise ConfigError(f"--gpus {gpus}: expected at least 1 (without a GPU, its worker computes on the CPU)")
    if devices and count > len(devices):
        raise ConfigError(f"--gpus {gpus}, but this process sees {len(devices)}: {', '.join(devices)}")
    machine = f"{platform.node() or 'worker'}-{port}"
    threads = max(1, threads_of_a_run() // count) if count > 1 else None
    # On a machine without GPUs nothing is pinned: its runs share the cores.
    pinned = devices[:count] if devices else [None] * count
    return [
        Worker(f"{machine}-cpu", "cpu"),
        *(Worker(f"{machine}-gpu-{i}", "gpu", 1, device, threads) for i, device in enumerate(pinned)),
    ]


def allowed_places(root: str) -> list[str]:
    """Return where runs may read and write: FUNCTA_ALLOWED_ROOTS, or what an operator who starts this here will need.

    That is: what lies beside the root, the current folder (with ./functa-runs), and the images that this user made the
    root of; a record of somebody else's root allows nothing. The folder above all homes, and those above that, would
    allow everything, and are never among them.
    """
    if listed := os.environ.get(ALLOWED_ROOTS):
        return [absolute(place) for place in read_places(listed)]
    beside, _, _ = root.rstrip("/").rpartition("/")
    config = newest_config(root)
    images = [] if config is None else [config.images.location, config.images.labels]
    needed = [root, beside if "://" not in root or beside.count("/") > 1 else "", str(Path.cwd())]
    named = [place for place in images if place not in ("", "none")]
    needed += [_folder_of(place) for place in named if was_allowed(open_location(root), place)]
    return list(dict.fromkeys(absolute(place) for place in needed if place and not _is_above_homes(place)))


def _folder_of(images: str) -> str:
    """Return the folder of a file, and what comes before a pattern; a folder is returned as it is."""
    from functa.storage.images.patterns import split_pattern

    folder, _ = split_pattern(images)
    is_file = bool(PurePosixPath(folder).suffix) if "://" in folder else Path(folder).is_file()
    return folder.rpartition("/")[0] if is_file else folder


def _is_above_homes(place: str) -> bool:
    return "://" not in place and Path(place).resolve() in Path.home().resolve().parents


def newest_config(root: str) -> "PipelineConfig | None":
    """Return the config of the newest stage that was begun in the root; None where there is none to read."""
    from functa.flows.config.load import recorded_config
    from functa.storage.runs.stage_records import read_record
    from functa.tasks.stage_table import STAGES

    with suppress(StorageError, ValueError):  # a damaged record, one of another version, a location without answer
        location = open_location(root)
        records = [record for name in STAGES if (record := read_record(location, name)) is not None]
        newest = max(records, key=lambda record: record.started, default=None)
        return None if newest is None else recorded_config(newest)
    return None
