"""On a server's workers: one run per GPU.

The server's limit, made by deploy/bootstrap.py with a slot for each device, queues runs that are too many. A lock of
this machine holds the device itself: the process of a worker that was killed may be at work when a new worker starts,
and a server that was away longer than a lease has given the slot to somebody else.
"""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from flows.server import GPU_LIMIT, OperateError

LEASE_SECONDS = 60.0  # a run that died holds its slot so long
POLL_SECONDS = 1.0

P = ParamSpec("P")
T = TypeVar("T")


def on_gpu(stage: Callable[P, T]) -> Callable[P, T]:
    """A flow's function that waits for a slot where a worker runs it."""

    @functools.wraps(stage)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        with gpu_slot():
            return stage(*args, **kwargs)

    return held


def started_by_worker() -> bool:
    """Whether the current flow run is one of a deployment, and not a call within another."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Holds one slot, and this process's devices; nothing where no worker runs this.

    A lease that cannot be renewed does not end the run: a server that was away must not cost hours of work.
    Raises OperateError where the server has no such limit.
    """
    if not started_by_worker():
        yield
        return
    from prefect import get_run_logger
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    begun = time.monotonic()
    with ExitStack() as held:
        slot = concurrency(GPU_LIMIT, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
        try:
            held.enter_context(slot)
        except ConcurrencySlotAcquisitionError:
            raise OperateError(
                f"the server has no concurrency limit '{GPU_LIMIT}': make it with `python -m deploy.bootstrap`"
            ) from None
        device = os.environ.get("CUDA_VISIBLE_DEVICES")
        for name in filter(None, (part.strip() for part in (device or "").split(","))):
            held.enter_context(device_lock(name))
        told = "its device" if device is None else f"device {device}" if device else "no GPU"
        waited = time.monotonic() - begun
        get_run_logger().info(f"has {told} of {platform.node()}, after {waited:.0f} s of waiting for a slot")
        yield


@contextmanager
def device_lock(name: str) -> Iterator[None]:
    """Waits until no other run of this user here has the device; the kernel lets go of it with the process."""
    from filelock import FileLock

    folder = Path(tempfile.gettempdir(), f"functa-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / f"{name.replace('/', '_')}.lock", poll_interval=POLL_SECONDS):
        yield
