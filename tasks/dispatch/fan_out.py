"""Many units of work at once: in threads of this process, or on a Dask cluster, as the config says."""

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

_over: ContextVar[threading.Event] = ContextVar("over")  # set for the threads of a fan-out, once that has ended


def fan_out(
    unit: "Task[..., Any]",
    each: Sequence[dict[str, Any]],
    dispatch: DispatchConfig,
    tick: Callable[[list[Any]], None] = lambda results: None,
    ended: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Calls the task with each of the parameters; the results, in their order.

    `tick` is called about every second with the results that are there, in the order in which they came. What a task
    raises is raised here as soon as it is known: what was not begun is not, and what runs finds itself given_up.
    `ended` is called afterwards in every process in which tasks ran and which lives on, to let go of what they kept.
    Raises DispatchError where the Dask cluster cannot be reached, has no workers, or is lost.
    """
    if not each:
        return []
    with _runner(dispatch, ended) as (runner, check), _ending():
        futures = [runner.submit(unit, parameters=parameters) for parameters in each]
        came: dict[int, Any] = {}
        told = time.monotonic()
        while len(came) < len(futures):
            for number, future in enumerate(futures):
                if number not in came and future.wrapped_future.done():
                    check()  # futures of a cluster that was lost are cancelled, which says less
                    came[number] = future.result()
            check()
            if len(came) < len(futures):
                time.sleep(POLL_SECONDS)
            if time.monotonic() - told >= TICK_SECONDS or len(came) == len(futures):
                told = time.monotonic()
                tick(list(came.values()))
        return [came[number] for number in range(len(futures))]


def given_up() -> bool:
    """In a unit of work: whether its fan-out has ended without it (a failure, Ctrl-C, a run that was killed)."""
    over = _over.get(None)
    if over is not None:
        return over.is_set()
    if "distributed" not in sys.modules:
        return False
    from functa.tasks.dispatch import dask_cluster as cluster

    return cluster.given_up()


@contextmanager
def _ending() -> Iterator[None]:
    """Threads that are begun inside hear of its end."""
    over = threading.Event()
    before = _over.set(over)
    try:
        yield
    finally:
        over.set()
        _over.reset(before)


@contextmanager
def _runner(
    dispatch: DispatchConfig, ended: Callable[[], None]
) -> "Iterator[tuple[TaskRunner[Any], Callable[[], None]]]":
    """The task runner, started, and what raises DispatchError if it was lost."""
    if dispatch.runner == "dask":
        from functa.tasks.dispatch.dask_cluster import dask_runner

        with dask_runner(dispatch, ended) as started:
            yield started
        return
    from prefect.task_runners import ThreadPoolTaskRunner

    try:
        with ThreadPoolTaskRunner(max_workers=dispatch.workers) as runner:
            yield runner, lambda: None
    finally:
        ended()
