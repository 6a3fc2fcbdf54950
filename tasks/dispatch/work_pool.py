"""Run units of work as runs of the deployment `work-group`: the workers of the pool share them, on any machine.

The flow run that requests them only submits and follows: it needs no device, and runs on queue cpu. A run that crashed,
as its worker was killed or vanished, is started again; what it has written is adopted. Work and results are small JSON.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx

from functa.storage.errors import FunctaError, one_line
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import DispatchError
from functa.tasks.dispatch.pool_messages import TAKEN, described, read_result, run_name

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.tasks import Task

DEPLOYMENT = "work-group/work-group"

# Runs that wait for a worker: at first, and at most. In between as many as have begun, so that no worker is idle: every
# worker reads all that wait, every few seconds.
FEW, AHEAD = 8, 50

POLL_SECONDS = 2.0

PENDING_SECONDS = 900.0  # a worker that took a run has started it by then, images of containers included

TAKEN_SECONDS = 120.0  # and a process that took one after another, though the server is busy

SILENCE_SECONDS = 120.0  # for which the server may be away

WAITING_SECONDS = 60.0  # between two lines about runs that no worker takes

TOGETHER_SECONDS = 300.0  # for which some runs wait for others that no worker takes, though all must work at once

PAGE = 200  # runs that the server returns at once


class GroupFailed(FunctaError):
    """A group of work failed on its worker, which would repeat itself."""


@dataclass
class _Group:
    """One unit of work and its newest run."""

    name: str
    parameters: dict[str, Any]
    run: "UUID | None" = None
    begun: int = 0  # runs so far
    pending_since: float | None = None


@dataclass
class _Groups:
    """The units of work of one fan-out, while they are submitted and followed."""

    client: "SyncPrefectClient"
    groups: list[_Group]
    tries: int
    together: bool = False  # all of them work at the same time, or none
    id: str = field(default_factory=lambda: uuid4().hex)
    waiting: int = 0  # runs that no worker had taken at the last look
    apart_since: float | None = None  # together: some have begun, and others wait
    results: dict[int, Any] = field(default_factory=dict)

    def advance(self) -> None:
        """Look at the runs, and submit as many as keep the workers busy."""
        self._stay_alive()
        self._look()
        ahead = min(AHEAD, max(FEW, len(self.open_runs()) - self.waiting))
        for number, group in enumerate(self.groups):
            if self.waiting >= ahead:
                break
            if group.run is None and number not in self.results:
                self._submit(number, group)
                self.waiting += 1
        if self.together:
            self._check_together()

    def open_runs(self) -> "list[UUID]":
        """Return the runs that have not ended, those begun first before others."""
        return [group.run for group in self.groups if group.run is not None]

    def _check_together(self) -> None:
        """Raise DispatchError where some have waited for long for others that no worker takes."""
        begun = len(self.open_runs()) - self.waiting
        if not begun or not self.waiting:
            self.apart_since = None
            return
        self.apart_since = time.monotonic() if self.apart_since is None else self.apart_since
        if time.monotonic() - self.apart_since > TOGETHER_SECONDS:
            raise DispatchError(
                f"{begun} of {len(self.groups)} runs that work at the same time have begun, and no worker has taken "
                f"the others for {TOGETHER_SECONDS:.0f} s: start as many workers, or wait until they are free"
            )

    def _stay_alive(self) -> None:
        """Correct this run's state if the server, busy for long, took it for dead: its groups would end."""
        from prefect import runtime
        from prefect.states import Running

        own = runtime.flow_run.id
        state = None if own is None else self.client.read_flow_run(UUID(own)).state
        if own is not None and state is not None and state.is_crashed():
            self.client.set_flow_run_state(UUID(own), Running(message="Its process is alive."), force=True)

    def _submit(self, number: int, group: _Group) -> None:
        from prefect.deployments import run_deployment
        from prefect.exceptions import PrefectHTTPStatusError

        try:
            run: Any = run_deployment(
                DEPLOYMENT, parameters=group.parameters, flow_run_name=group.name, timeout=0, as_subflow=True,
                idempotency_key=f"{self.id}-{number}-{group.begun}",  # one run, also if the first answer was lost
            )  # fmt: skip
        except PrefectHTTPStatusError as error:
            if error.response.status_code >= 500:
                raise  # the server is away or busy
            reason = " ".join(error.response.text.split())[:300]
            raise DispatchError(
                f"{group.name}: the server refuses deployment {DEPLOYMENT} ({reason}); "
                f"renew it with `python -m functa.deploy.bootstrap`"
            ) from None
        group.run, group.begun, group.pending_since = run.id, group.begun + 1, None

    def _look(self) -> None:
        found = {run.id: run for run in read_runs(self.client, self.open_runs())}
        self.waiting = 0
        for number, group in enumerate(self.groups):
            if group.run is None:
                continue
            run = found.get(group.run)
            if run is None or run.state is None:
                raise DispatchError(f"{group.name}: its run was deleted from the server; what it wrote is kept")
            if run.state.is_completed():
                self.results[number] = read_result(self.client, run)
                group.run = None
            elif run.state.is_crashed() or self._is_stuck(group, run):
                self._lost(group, run)
            elif run.state.is_final():
                raise GroupFailed(f"{group.name}: {_fault(run)}")
            self.waiting += group.run is not None and run.state.is_scheduled()

    def _is_stuck(self, group: _Group, run: "FlowRun") -> bool:
        """Return whether the worker that took the run vanished before it began: nothing else would notice."""
        if run.state is None or not run.state.is_pending():
            group.pending_since = None
            return False
        group.pending_since = time.monotonic() if group.pending_since is None else group.pending_since
        patience = TAKEN_SECONDS if run.state.message == TAKEN else PENDING_SECONDS
        if time.monotonic() - group.pending_since < patience:
            return False
        from prefect.states import Crashed

        state: Any = Crashed(message=f"Its worker has not started it for {patience:.0f} s; another takes it.")
        self.client.set_flow_run_state(run.id, state, force=True)
        return True

    def _lost(self, group: _Group, run: "FlowRun") -> None:
        """Let the group be submitted again. Raises DispatchError after too many tries."""
        from prefect import get_run_logger

        if self.together:
            raise DispatchError(
                f"{group.name}: its run died ({_fault(run)}), which ends the others; the same command continues with "
                f"what was saved"
            )
        if group.begun > self.tries:
            raise DispatchError(
                f"{group.name}: {group.begun} runs died one after the other ({_fault(run)}); out of memory? Set a "
                f"smaller batch"
            )
        get_run_logger().warning(f"{group.name}: run '{run.name}' is lost ({_fault(run)}); another worker takes it")
        group.run = None


def run_on_pool(
    unit: "Task[..., Any]",
    each: Sequence[dict[str, Any]],
    dispatch: DispatchConfig,
    tick: Callable[[list[Any]], None],
    together: bool = False,
) -> list[Any]:
    """Call the task with each of the parameters on the pool's workers; return the results, as JSON, in order.

    together: the units work at the same time and with each other, so that none is started again by itself.
    Whatever ends this early cancels the runs. Raises GroupFailed for the first that failed, DispatchError where the
    server has no such deployment, refuses it or stays away, and where runs die again and again.
    """
    from prefect.client.orchestration import get_client

    parameters = {"retries": dispatch.retries, "retry_delay": dispatch.retry_delay}
    groups = [_Group(run_name(unit, one), parameters | {"work": described(unit, one)}) for one in each]
    with get_client(sync_client=True) as client:
        _check_deployment(client)
        following = _Groups(client, groups, dispatch.retries, together)
        with cancelling(client, following.open_runs):
            _follow(following, tick)
    return [following.results[number] for number in range(len(groups))]


def _follow(following: _Groups, tick: Callable[[list[Any]], None]) -> None:
    answered = logged = time.monotonic()
    while True:
        try:
            following.advance()
            answered = time.monotonic()
        except httpx.HTTPError as error:
            silence = time.monotonic() - answered
            if silence > SILENCE_SECONDS:
                raise DispatchError(
                    f"the server has not answered for {silence:.0f} s ({type(error).__name__}); what was written is "
                    f"kept, and the same command continues"
                ) from None
        else:
            if len(following.open_runs()) > following.waiting:
                logged = time.monotonic()
            elif following.waiting and time.monotonic() - logged >= WAITING_SECONDS:
                logged = time.monotonic()
                _warn_of_waiting(following)
        tick(list(following.results.values()))
        if len(following.results) == len(following.groups):
            return
        time.sleep(POLL_SECONDS)


def _warn_of_waiting(following: _Groups) -> None:
    """Log why no run has begun."""
    from prefect import get_run_logger

    with suppress(httpx.HTTPError):
        deployment = following.client.read_deployment_by_name(DEPLOYMENT)
        queue, pool = deployment.work_queue_name, deployment.work_pool_name
        get_run_logger().warning(
            f"{following.waiting} runs of {DEPLOYMENT} wait, and none has begun: every worker of queue {queue} is at "
            f"work, or there is none (start one with `prefect worker start --pool {pool} --work-queue {queue} "
            f"--limit 1`)"
        )


def check_pool() -> None:
    """Raise DispatchError if the server has no deployment that runs groups of work, or none answers."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _check_deployment(client)


def _check_deployment(client: "SyncPrefectClient") -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound:
        raise DispatchError(
            f"dispatch.runner=prefect: the server at {client.api_url} has no deployment {DEPLOYMENT}: name one with "
            f"workers by PREFECT_API_URL, make the deployment with `python -m functa.deploy.bootstrap` (`functa up` "
            f"does), or choose dispatch.runner=threads"
        ) from None
    except httpx.HTTPError as error:
        raise DispatchError(f"{client.api_url}: no Prefect server answers ({one_line(error)})") from None


def read_runs(client: "SyncPrefectClient", ids: "Sequence[UUID]") -> "Iterator[FlowRun]":
    """Yield the runs of these ids that the server knows."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    for start in range(0, len(ids), PAGE):
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        yield from client.read_flow_runs(flow_run_filter=chosen, limit=PAGE)


@contextmanager
def cancelling(client: "SyncPrefectClient", runs: "Callable[[], Iterable[UUID]]") -> Iterator[None]:
    """Cancel these runs if this block is left by an exception: a failure, Ctrl-C, a run that is cancelled itself.

    A worker ends the process of a run that is being cancelled; one that nobody has begun is cancelled at once.
    """
    from prefect.exceptions import PrefectException
    from prefect.states import Cancelling

    try:
        yield
    except BaseException:
        state: Any = Cancelling(message="The run that requested it has ended.")
        for run in runs():
            with suppress(httpx.HTTPError, PrefectException):
                current = client.read_flow_run(run).state
                if current is not None and not current.is_final():
                    client.set_flow_run_state(run, state)
        raise


def _fault(run: "FlowRun") -> str:
    """Return what the run's state reports, without Prefect's words around an exception."""
    message = " ".join(((run.state and run.state.message) or "see its logs").split())
    _, found, fault = message.partition("encountered an exception: ")
    name = (run.state and run.state.name) or "ended"
    return fault if found else f"{name}: {message}"
