"""Groups of work on a pool: which run is started when, and how each end of a run is answered. The server is played."""

import json
import re
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running, Scheduled

from functa.tasks import prefect_tasks
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch import pool_messages, work_pool
from functa.tasks.dispatch.child import DispatchError
from functa.tasks.dispatch.work_pool import GroupFailed, run_on_pool
from functa.tasks.encoding.plan import MOST_GROUPS, ShardGroup, _groups

GROUP = ShardGroup(fragment="f", split="train", shards=(0, 1), images=8)


class Server:
    """A Prefect server whose workers are played: `begin` returns the states that a new run goes through."""

    def __init__(self, begin: Any) -> None:
        self.begin, self.api_url = begin, "http://server/api"
        self.runs: dict[UUID, Any] = {}
        self.states: dict[UUID, list[Any]] = {}
        self.parameters: dict[UUID, dict[str, Any]] = {}
        self.cancelled: list[UUID] = []
        self.deployed = True

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def read_deployment_by_name(self, name: str) -> Any:
        if not self.deployed:
            from prefect.exceptions import ObjectNotFound

            raise ObjectNotFound(Exception())
        return SimpleNamespace(work_queue_name="gpu", work_pool_name="functa")

    def run_deployment(self, name: str, **given: Any) -> Any:
        run = SimpleNamespace(id=uuid4(), name=given["flow_run_name"])
        self.runs[run.id], self.parameters[run.id] = run, given["parameters"]
        self.states[run.id] = self.begin(given["parameters"]["work"], len(self.runs))
        return run

    def read_flow_runs(self, flow_run_filter: Any, limit: int) -> list[Any]:
        found = []
        for run in flow_run_filter.id.any_:
            states = self.states[run]
            state = states.pop(0) if len(states) > 1 else states[0]
            if isinstance(state, Exception):
                raise state
            found.append(SimpleNamespace(id=run, name=self.runs[run].name, state=state))
        return found

    def read_flow_run(self, run: UUID) -> Any:
        state = self.states[run][0]
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(state=state)

    def read_artifacts(self, artifact_filter: Any) -> list[Any]:
        (run,) = artifact_filter.flow_run_id.any_
        rows = [{"figure": "", "value": json.dumps(self.parameters[run]["work"]["job"])}]
        other = SimpleNamespace(description="another table", data="[]")
        return [other, SimpleNamespace(description=pool_messages.RESULT, data=json.dumps(rows))]

    def set_flow_run_state(self, run: UUID, state: Any, force: bool = False) -> None:
        if state.is_cancelling():
            self.cancelled.append(run)
        if state.is_running():
            self.states[run] = [state]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings that were logged."""
    found: list[str] = []
    monkeypatch.setattr("prefect.get_run_logger", lambda: SimpleNamespace(warning=found.append))
    monkeypatch.setattr(work_pool, "POLL_SECONDS", 0.001)
    return found


def run(
    server: Server, monkeypatch: pytest.MonkeyPatch, count: int = 3, together: bool = False, **dispatch: Any
) -> list[Any]:
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: server)
    monkeypatch.setattr("prefect.deployments.run_deployment", server.run_deployment)
    each = [{"job": number, "group": GROUP, "images": 8, "run": "r"} for number in range(count)]
    config = DispatchConfig(runner="prefect", **dispatch)
    return run_on_pool(prefect_tasks.encode_shards, each, config, lambda results: None, together)


def test_results_come_in_order_and_work_is_named_by_its_task(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    slow = {0: 5, 1: 1, 2: 3}
    server = Server(lambda work, _: [Scheduled(), *[Running()] * slow[work["job"]], Completed()])
    assert run(server, monkeypatch) == [0, 1, 2]
    (first, *_) = server.parameters.values()
    group = GROUP.model_dump(mode="json")
    work = {"kind": "encode-shards", "job": 0, "group": group, "images": 8, "run": "r"}
    assert first == {"work": work, "retries": 2, "retry_delay": 2.0}
    assert {each.name for each in server.runs.values()} == {"encode train shards 0 to 1"}
    assert not lines and not server.cancelled


def test_a_crashed_run_is_started_again_until_it_has_died_too_often(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    dead: Any = Crashed(message="No heartbeat for 90 s")
    server = Server(lambda work, number: [Running(), dead if number == 1 else Completed()])
    assert run(server, monkeypatch) == [0, 1, 2]
    assert len(server.runs) == 4
    (line,) = lines
    assert "is lost (Crashed: No heartbeat for 90 s); another worker takes it" in line
    server = Server(lambda work, number: [Running(), dead if work["job"] == 1 else Completed()])
    with pytest.raises(DispatchError, match=r"2 runs died one after the other .* out of memory\?"):
        run(server, monkeypatch, retries=1)


@pytest.mark.parametrize(("patience", "message"), [("PENDING_SECONDS", None), ("TAKEN_SECONDS", pool_messages.TAKEN)])
def test_a_run_whose_worker_vanished_before_it_began_is_started_again(
    patience: str, message: str | None, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(work_pool, patience, 0.05)
    server = Server(lambda work, number: [Pending(message=message) if number == 1 else Completed()])
    assert run(server, monkeypatch) == [0, 1, 2]
    assert len(server.runs) == 4


@pytest.mark.parametrize("ended", [Failed, Cancelled])
def test_a_failed_run_is_raised_and_cancels_the_others(
    ended: Any, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    fault = "Flow run encountered an exception: StorageError: f: disk full"
    server = Server(lambda work, _: [Running(), ended(message=fault) if work["job"] == 1 else Running()])
    with pytest.raises(GroupFailed, match=r"^encode train shards 0 to 1: StorageError: f: disk full$"):
        run(server, monkeypatch)
    assert set(server.cancelled) == {run for run, given in server.parameters.items() if given["work"]["job"] != 1}


def test_runs_that_work_together_end_with_the_first_that_dies(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    dead: Any = Crashed(message="killed")
    server = Server(lambda work, _: [Running(), dead if work["job"] == 1 else Running()])
    with pytest.raises(DispatchError, match=r"its run died \(Crashed: killed\), which ends the others"):
        run(server, monkeypatch, together=True)
    assert len(server.runs) == 3
    assert len(server.cancelled) >= 2


def test_runs_that_work_together_do_not_wait_for_ever_for_one_that_no_worker_takes(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(work_pool, "TOGETHER_SECONDS", 0.02)
    slow: list[Any] = [*[Scheduled()] * 20, Running(), Completed()]
    assert run(Server(lambda work, _: list(slow)), monkeypatch, together=True) == [0, 1, 2]  # none has begun
    server = Server(lambda work, _: [Scheduled() if work["job"] == 2 else Running()])
    with pytest.raises(DispatchError, match="2 of 3 runs that work at the same time have begun, and no worker has"):
        run(server, monkeypatch, together=True)
    assert set(server.cancelled) == set(server.runs)


def test_whatever_ends_the_waiting_cancels_every_run(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    server = Server(lambda work, _: [Running()])
    monkeypatch.setattr(server, "read_flow_runs", _interrupted(server.read_flow_runs))
    with pytest.raises(KeyboardInterrupt):
        run(server, monkeypatch)
    assert set(server.cancelled) == set(server.runs)


def _interrupted(read: Any) -> Any:
    looks = iter(range(3))

    def looked(**given: Any) -> Any:
        if next(looks) == 2:
            raise KeyboardInterrupt
        return read(**given)

    return looked


def test_a_few_runs_wait_at_the_server_and_the_next_follow_as_they_begin(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(work_pool, "FEW", 4)
    waiting: list[int] = []
    server = Server(lambda work, _: [Scheduled(), Scheduled(), Running(), Completed()])
    begin = server.run_deployment

    def counted(name: str, **given: Any) -> Any:
        waiting.append(sum(states[0].is_scheduled() for states in server.states.values()))
        return begin(name, **given)

    monkeypatch.setattr(server, "run_deployment", counted)
    assert run(server, monkeypatch, 30) == list(range(30))
    assert max(waiting) <= 4 + 1


def test_a_server_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    away = httpx.ConnectError("refused")
    server = Server(lambda work, _: [Running(), away, away, Completed()])
    assert run(server, monkeypatch) == [0, 1, 2]
    monkeypatch.setattr(work_pool, "SILENCE_SECONDS", 0.05)
    server = Server(lambda work, _: [Running(), away])
    with pytest.raises(DispatchError, match=r"the server has not answered for 0 s \(ConnectError\); what was written"):
        run(server, monkeypatch)


def test_a_run_that_the_server_took_for_dead_corrects_its_state(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Its groups, which look at it, would end otherwise."""
    server, own = Server(lambda work, _: [Running(), Completed()]), uuid4()
    server.states[own] = [Crashed(message="No heartbeat for 90 s")]
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", str(own))
    assert run(server, monkeypatch) == [0, 1, 2]
    assert server.states[own][0].is_running()


def test_runs_that_no_worker_takes_are_reported(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(work_pool, "WAITING_SECONDS", 0.01)
    server = Server(lambda work, _: [*[Scheduled()] * 60, Completed()])
    run(server, monkeypatch)
    assert re.search(
        r"3 runs of work-group/work-group wait, and none has begun: .* --work-queue gpu --limit 1", lines[0]
    )


def test_a_server_without_the_deployment_is_refused(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    server = Server(lambda work, _: [Completed()])
    server.deployed = False
    with pytest.raises(DispatchError, match=r"has no deployment work-group/work-group: name one .*PREFECT_API_URL"):
        run(server, monkeypatch)


def test_an_encoding_has_at_most_so_many_groups() -> None:
    def fragment(split: str, count: int) -> Any:
        shards = tuple(SimpleNamespace(number=number, size=4) for number in range(count))
        return SimpleNamespace(id=split, plan=SimpleNamespace(split=split, shards=count), shards=shards)

    few = _groups([fragment("train", 10)], 4)
    assert [group.numbers for group in few] == ["0 to 3", "4 to 7", "8 to 9"]
    many = _groups([fragment("train", 100_000), fragment("test", 1)], 4)
    assert len(many) <= MOST_GROUPS + 1
    assert sum(len(group.shards) for group in many) == 100_001
    assert many[-1].numbers == "0"
