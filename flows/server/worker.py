"""Allow one run per GPU on a server's workers.

The server's limit, made by deploy/bootstrap.py with a slot for each device, queues the runs beyond it. A lock of this
machine protects the device itself: the process of a killed worker may still run when a new worker starts, and a server
that was away longer than a lease has given the slot to another run.
"""

import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functa.flows.server.api import GPU_LIMIT, WAITING_QUEUE, OperateError
from functa.storage.errors import one_line
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.dask_cluster import device_identities
from functa.tasks.dispatch.fan_out import run_ended
from functa.tasks.dispatch.progress import warn_if_unreachable

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

LEASE_SECONDS = 60.0  # a killed run holds its slot for this long

POLL_SECONDS = 1.0

WAIT_SECONDS = 30.0  # for a slot, between two looks at whether the run is still wanted

SILENCE_SECONDS = 120.0  # for which a server may be away while a run waits for its slot


def started_by_worker() -> bool:
    """Return whether the current flow run is one of a deployment, and not a call within another."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def moved_to_cpu_queue() -> "State[None] | None":
    """Start this run anew on queue cpu, unless it is there; return the state to end with, None to go on.

    For a run that only waits for other runs: on another queue it would keep a worker and its device from these.
    """
    from prefect.context import FlowRunContext
    from prefect.deployments import run_deployment
    from prefect.states import Completed

    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    if run is None or run.deployment_id is None or run.work_queue_name == WAITING_QUEUE:
        return None
    moved: Any = run_deployment(
        run.deployment_id, parameters=run.parameters, flow_run_name=run.name, work_queue_name=WAITING_QUEUE,
        timeout=0, as_subflow=False, idempotency_key=f"moved-{run.id}",
    )  # fmt: skip
    message = f"dispatch.runner=prefect: continues as run {moved.id} on queue {WAITING_QUEUE}, where it holds no device"
    return Completed(name="Moved", message=message)


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot and this process's devices; do nothing if no worker runs this.

    A lease that cannot be renewed does not end the run: a server that was away must not cost hours of work.
    Raises OperateError if the server has no such limit; RunEnded where the run is cancelled while it waits.
    """
    if not started_by_worker():
        yield
        return
    from prefect import get_run_logger

    outlive_the_worker()
    begun = time.monotonic()
    with ExitStack() as held:
        held.enter_context(_slot())
        device = os.environ.get("CUDA_VISIBLE_DEVICES")
        # In one order, or two runs could wait for each other.
        for name in sorted(set(device_identities()) if device else ()):
            held.enter_context(device_lock(name))
        share = "its device" if device is None else f"device {device}" if device else "no GPU"
        waited = time.monotonic() - begun
        get_run_logger().info(f"has {share} of {platform.node()}, after {waited:.0f} s of waiting for a slot")
        yield


@contextmanager
def _slot() -> Iterator[None]:
    """Hold one slot of the server's limit. If the server is away at the end, the slot's lease runs out."""
    slot = _taken()
    try:
        yield
    finally:
        with warn_if_unreachable("the end of its slot's lease"):
            slot.__exit__(None, None, None)


def _taken() -> AbstractContextManager[None]:
    """Wait for a slot and return it.

    Raises OperateError: no such limit, or the server refuses or stays away. RunEnded: see above.
    """
    import httpx
    from prefect import get_run_logger
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    away: float | None = None
    while True:
        _check_wanted()
        slot = concurrency(
            GPU_LIMIT, strict=True, timeout_seconds=WAIT_SECONDS, lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )  # fmt: skip
        asked = time.monotonic()
        try:
            slot.__enter__()
            return slot
        except TimeoutError:
            away = None
            continue
        except ConcurrencySlotAcquisitionError as error:
            fault = error.__cause__
        if fault is None:
            raise OperateError(
                f"the server has no concurrency limit '{GPU_LIMIT}': make it with `python -m functa.deploy.bootstrap`"
            )
        reason = one_line(fault)
        away = asked if away is None else away
        if not isinstance(fault, httpx.TransportError) or time.monotonic() - away > SILENCE_SECONDS:
            raise OperateError(f"no slot of concurrency limit '{GPU_LIMIT}' could be had: {reason}")
        get_run_logger().warning(f"waits for a slot, but the server does not answer ({reason})")
        time.sleep(POLL_SECONDS)


@contextmanager
def device_lock(name: str) -> Iterator[None]:
    """Hold the device, once no other run of this user here does; the kernel frees it when the process ends.

    Raises RunEnded where the run is cancelled while it waits.
    """
    from filelock import FileLock, Timeout

    folder = Path(tempfile.gettempdir(), f"functa-devices-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = FileLock(folder / f"{name.replace('/', '_')}.lock")
    while True:
        _check_wanted()
        with suppress(Timeout):
            lock.acquire(timeout=POLL_SECONDS)
            break
    try:
        yield
    finally:
        lock.release()


def _check_wanted() -> None:
    """Raise RunEnded for a group of work that is cancelled: its worker may not know that this process is at it."""
    if run_ended():
        raise RunEnded("was cancelled while it waited for its device")


def outlive_the_worker() -> None:
    """From now on a log line that cannot be written does not end this process; the server has its logs anyway.

    Workers read their runs' output through a pipe. Once its reader has ended, rich, which writes Prefect's lines, exits
    at the next one.
    """
    for console in _consoles():
        console.on_broken_pipe = _discard_output


def _consoles() -> Iterator[Any]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if (console := getattr(handler, "console", None)) is not None:
                yield console


def _discard_output() -> None:
    discard = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(discard, stream)
    os.close(discard)
