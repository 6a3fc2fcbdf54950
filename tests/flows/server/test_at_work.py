"""Two machines, containers or pods at one stage of one root: the server knows whether the other one still runs."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Crashed, Running

from functa.flows.server.at_work import check_nobody_at_work
from functa.storage.errors import StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect_server")]


def record(run: str, owner: str = "elsewhere/12/34.5") -> StageRecord:
    return StageRecord(
        stage="encode", state="running", config={}, inputs={}, output="functaset.zarr",
        started="2026-01-01T00:00:00Z", owner=owner, flow_run=run,
    )  # fmt: skip


@flow
def asking(root: str, of: StageRecord) -> None:
    check_nobody_at_work(open_location(root), of)


@flow
def others_run() -> None:
    """Replace a run of another machine; its states are set by the test."""


@pytest.fixture
def other(prefect_server: None) -> tuple[str, Callable[..., None]]:
    """A run, and a function that sets its state."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(others_run)

    def becomes(state: Callable[[], object]) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, state(), force=True)  # type: ignore[arg-type]

    return str(run.id), becomes


def test_a_running_run_of_another_machine_is_a_conflict_until_it_has_ended(
    other: tuple[str, Callable[..., None]], tmp_path: Path
) -> None:
    run, becomes = other
    becomes(Running)
    message = (
        rf"run {run} on elsewhere is at encode there since 2026-01-01T00:00:00Z \(Running\); wait for it, cancel it"
    )
    with pytest.raises(StorageError, match=message):
        asking(str(tmp_path), record(run))
    for end in (Crashed, Running, Completed):
        becomes(end)
        if end is not Running:
            asking(str(tmp_path), record(run))


def test_a_run_that_no_server_knows_is_no_conflict(tmp_path: Path) -> None:
    for run in (str(uuid4()), "", "no id"):
        asking(str(tmp_path), record(run))
    check_nobody_at_work(open_location(str(tmp_path)), record(str(uuid4())))  # not a flow run: nobody to ask
