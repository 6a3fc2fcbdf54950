"""Forks: what a process opened (threads, locks, connections) is not there in its forks, which would hang or mix up."""

import os

from storage.errors import StorageError


def refuse_fork(opened_in: int, name: str) -> None:
    """Raises StorageError in any other process than the one that opened `name`."""
    if os.getpid() != opened_in:
        raise StorageError(
            f"{name}: was opened in process {opened_in} and is used in its fork {os.getpid()}; start workers afresh: "
            "DataLoader(..., multiprocessing_context='spawn'), or num_workers=0"
        )
