"""Run many units of work at once: in threads of this process, on the workers of Prefect's pool or on a Dask cluster."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from functa.tasks.config import DispatchConfig

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner
    from prefect.tasks import Task


TICK_SECONDS = 1.0

POLL_SECONDS = 0.25

_over: ContextVar[threading.Event] = ContextVar("over")  # of the fan-out that this thread works for; set at its end


def fan_out(
    unit: "Task[..., Any]",
    each: Sequence[dict[str, Any]],
    dispatch: DispatchConfig,
    tick: Callable[[list[Any]], None] = lambda results: None,
    ended: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Call the task with each of the parameters; return the results in the same order.

    `tick` is called about every second with the results so far, in the order of their completion. An exception of a
    task is raised here at once: waiting tasks are not started, and in running ones run_ended() becomes true.
    `ended` is called afterwards in every surviving process that ran tasks, to free what they kept. On the pool each
    unit is a flow run in a process of its own, and results are JSON.
    Raises DispatchError if pool or Dask cluster cannot be reached, have no workers, or are lost.
    """
    if not each:
        return []
    if dispatch.runner == "prefect":
        from functa.tasks.dispatch.work_pool import run_on_pool

        return run_on_pool(unit, each, dispatch, tick)
    with _runner(dispatch, ended) as (runner, check), _ending():
        futures = [runner.submit(unit, parameters=parameters) for parameters in each]
        results: dict[int, Any] = {}
        ticked = time.monotonic()
        while len(results) < len(futures):
            for number, future in enumerate(futures):
                if number not in results and future.wrapped_future.done():
                    check()  # a lost cluster cancels its futures, whose error would be less clear
                    results[number] = future.result()
            check()
            if len(results) < len(futures):
                time.sleep(POLL_SECONDS)
            if time.monotonic() - ticked >= TICK_SECONDS or len(results) == len(futures):
                ticked = time.monotonic()
                tick(list(results.values()))
        return [results[number] for number in range(len(futures))]


def call_once(unit: "Task[..., Any]", dispatch: DispatchConfig, **parameters: Any) -> Any:
    """Call the task where there is a device: in this process, or on the pool if this one only waits for its runs."""
    return fan_out(unit, [parameters], dispatch)[0] if dispatch.runner == "prefect" else unit(**parameters)


def run_ended() -> bool:
    """Return whether the fan-out of the current unit of work has ended (failure, Ctrl-C, a killed run)."""
    over = _over.get(None)
    if over is not None:
        return over.is_set()
    if "distributed" not in sys.modules:
        return False
    from functa.tasks.dispatch import dask_cluster

    return dask_cluster.run_ended()


@contextmanager
def _ending() -> Iterator[None]:
    """Let threads that start inside this context see its end."""
    over = threading.Event()
    try:
        with ended_by(over):
            yield
    finally:
        over.set()


@contextmanager
def ended_by(over: threading.Event) -> Iterator[None]:
    """Let units of work within, and in threads that start within, end once the event is set."""
    before = _over.set(over)
    try:
        yield
    finally:
        _over.reset(before)


@contextmanager
def _runner(
    dispatch: DispatchConfig, ended: Callable[[], None]
) -> "Iterator[tuple[TaskRunner[Any], Callable[[], None]]]":
    """Start the task runner; yield it, and a check that raises DispatchError if it was lost."""
    if dispatch.runner == "dask":
        from functa.tasks.dispatch.dask_cluster import dask_runner

        with dask_runner(dispatch, ended) as started:
            yield started
        return
    from prefect.task_runners import ThreadPoolTaskRunner

    try:
        runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=dispatch.workers)
        with runner:
            yield runner, lambda: None
    finally:
        ended()
