"""The process of a group of work: further groups of the same parent, and an end with the parent. Free of a server."""

import time
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Cancelling, Completed, Failed, Running

from functa.flows.server.pool import work_group
from functa.flows.server.pool.work_group import ending_early, go_on
from functa.tasks.dispatch.child import RunEnded
from functa.tasks.dispatch.fan_out import run_ended

PARENT = uuid4()


class Server:
    """A server with runs that wait; a worker takes those named `taken` first."""

    def __init__(self, waiting: list[str], taken: tuple[str, ...] = (), state: State[Any] | None = None) -> None:
        self.waiting = {uuid4(): name for name in waiting}
        self.taken, self.state = taken, state

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def read_flow_runs(self, flow_run_filter: Any, sort: Any, limit: int) -> list[Any]:
        assert flow_run_filter.parent_flow_run_id.any_ == [PARENT]
        return [SimpleNamespace(id=run) for run in list(self.waiting)[:limit]]

    def set_flow_run_state(self, run: UUID, state: State[Any]) -> Any:
        assert state.is_pending()
        taken = self.waiting[run] in self.taken
        return SimpleNamespace(status=SetStateStatus.ABORT if taken else SetStateStatus.ACCEPT)

    def read_flow_run(self, run: UUID) -> Any:
        return SimpleNamespace(id=run, name=self.waiting.pop(run, ""), state=self.state)


def done_by(server: Server, monkeypatch: pytest.MonkeyPatch, ends: Any = Completed) -> list[str]:
    """Return the groups that a process does after its own."""
    done: list[str] = []

    def run_flow(flow: Any, flow_run: Any, return_type: str) -> State[Any]:
        done.append(flow_run.name)
        go_on(flow, flow_run, Completed())  # as Prefect calls it for each run of the flow: it must not nest
        state: State[Any] = ends()
        return state

    monkeypatch.setattr(work_group, "get_client", lambda **_: server)
    monkeypatch.setattr(work_group, "run_flow", run_flow)
    monkeypatch.setattr(work_group, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(
        work_group, "runtime", SimpleNamespace(flow_run=SimpleNamespace(parent_flow_run_id=str(PARENT)))
    )
    own: Any = SimpleNamespace(deployment_id=uuid4())
    go_on(work_group.work_group, own, Completed())
    return done


def test_a_process_does_the_groups_that_no_worker_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert done_by(Server(["a", "b", "c"], taken=("b",)), monkeypatch) == ["a", "c"]


def test_a_process_ends_after_a_failure_and_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert done_by(Server(["a", "b"]), monkeypatch, Failed) == ["a"]
    monkeypatch.setattr(work_group, "PROCESS_SECONDS", -1.0)
    assert done_by(Server(["a", "b"]), monkeypatch) == []


def test_a_group_ends_with_the_run_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([], state=Running())
    monkeypatch.setattr(work_group, "get_client", lambda **_: server)
    monkeypatch.setattr(work_group, "LOOK_SECONDS", 0.01)
    with ending_early(str(uuid4()), str(PARENT)):
        assert not run_ended()
        server.state = Cancelling()
        for _ in range(500):
            if run_ended():
                break
            time.sleep(0.01)
        assert run_ended()
    with pytest.raises(RunEnded, match="was not begun"), ending_early(str(uuid4()), str(PARENT)):
        pass
    with ending_early(None, None):
        assert not run_ended()
