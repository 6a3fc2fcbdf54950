"""Check whether a stage of a root is being worked on: by a process of this machine, or a run known to the server."""

import sys

from functa.storage.errors import StorageError
from functa.storage.places.location import Location
from functa.storage.runs.owner import host_of
from functa.storage.runs.stage_records import StageRecord, check_not_at_work, is_elsewhere
from functa.tasks.stage_table import STAGES


def check_nobody_at_work(root: Location, record: StageRecord) -> None:
    """Raise StorageError if another run works on the stage now: two would spoil each other's files.

    For a process of another machine, container or pod the server is asked, if both are flow runs. A run that the
    server knows to have crashed (it needs about two minutes to notice), or does not know at all, is no obstacle.
    """
    check_not_at_work(root, record)
    if not is_elsewhere(record) or not record.flow_run or record.flow_run == current_flow_run():
        return
    state = _state_at_server(record.flow_run)
    if state:
        raise StorageError(
            f"{root.uri}: run {record.flow_run} on {host_of(record.owner)} is at {STAGES[record.stage].command} there "
            f"since {record.started} ({state}); wait for it, cancel it, or choose another --root; if its machine will "
            f"not come back, delete {root.uri}/stages/{record.stage}.json (outputs stay) and run the command again"
        )


def current_flow_run() -> str:
    """Return the id of the current flow run; empty outside of one. Does not load Prefect."""
    if "prefect.context" not in sys.modules:
        return ""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return "" if context is None or context.flow_run is None else str(context.flow_run.id)


def _state_at_server(run: str) -> str:
    """Return the run's state if it has not ended; empty if it has, is unknown, or there is no server to ask."""
    if not current_flow_run():
        return ""
    from uuid import UUID

    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run)).state
    except (ObjectNotFound, ValueError, httpx.HTTPError):
        return ""
    return "" if state is None or state.is_final() else state.name or str(state.type)
