"""Whether somebody else is at a stage of a root: a process of this machine, or a run that the server knows of."""

import sys

from functa.storage.errors import StorageError
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import StageRecord, check_not_at_work, is_elsewhere


def check_nobody_at_work(root: Location, record: StageRecord) -> None:
    """Raises StorageError if another run is at the stage now: two would spoil each other's files.

    Of a process of another machine, container or pod the server is asked, where this is a flow run and that was one.
    A run of which the server has heard that it died (its watch needs about two minutes), or of which it knows nothing,
    stands in nobody's way.
    """
    check_not_at_work(root, record)
    if not is_elsewhere(record) or not record.flow_run or record.flow_run == current_flow_run():
        return
    state = _state_at_server(record.flow_run)
    if state:
        host = record.owner.partition("/")[0]
        raise StorageError(
            f"{root.uri}: run {record.flow_run} on {host} is at {record.stage.replace('_', '-')} there since "
            f"{record.started} ({state}); wait for it, cancel it, or choose another --root"
        )


def current_flow_run() -> str:
    """Id of the flow run that this is part of; empty outside of one. Does not load Prefect."""
    if "prefect.context" not in sys.modules:
        return ""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return "" if context is None or context.flow_run is None else str(context.flow_run.id)


def _state_at_server(run: str) -> str:
    """Name of the run's state if it has not ended; empty: it has, nobody knows it, or there is no server to ask."""
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
