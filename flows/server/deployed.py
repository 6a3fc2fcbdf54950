"""Run the pipeline on a server's workers (`functa run --deployment`) and follow it."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import Console

from functa.flows.config.load import with_absolute_images
from functa.flows.config.schema import PipelineConfig
from functa.flows.server.api import (
    POOL,
    PORT,
    QUEUES,
    OperateError,
    absolute,
    configured_api,
    fetch,
    healthy,
    local_api,
    password_fault,
    password_of,
    prepare_environment,
    using,
)
from functa.flows.server.console import text_console
from functa.storage.errors import one_line

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State


DEPLOYMENT = "pipeline/pipeline"

POLLED_WITHIN = timedelta(seconds=60)

WORKER_SECONDS = 30

POLL_SECONDS = 2.0

SILENCE_SECONDS = 120

LINE_SECONDS = 60  # between two lines of progress where the output is no terminal


def run_deployed(
    config: PipelineConfig, root: str, from_root: str | None = None, console: Console | None = None
) -> "State":
    """Start deployment pipeline/pipeline with this config, follow it, return its final state.

    Raises OperateError where there is no server, no deployment, or no worker that would take the run.
    """
    console = console or text_console()
    prepare_environment()
    api = find_api()
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with using(api), get_client(sync_client=True) as client:
            check_deployment(client, api)
            wait_for_workers(client, api, console)
            run = trigger(config, root, from_root)
            address = run_address(api, run.id)
            console.print(f"Run '{run.name}': {address}", soft_wrap=True)
            state = follow(client, run.id, address, console)
    except httpx.HTTPError as error:
        raise OperateError(f"{api}: {one_line(error)}") from None
    outcome = f"{state.name}: {state.message}" if state.message else state.name
    console.print(f"Run '{run.name}': {outcome}", soft_wrap=True)
    return state


@contextmanager
def on_server() -> Iterator[None]:
    """Use the server's API in this process, checked to be served, for a flow whose children are runs on workers.

    Raises OperateError if none answers, the deployment is missing, or no worker comes.
    """
    prepare_environment()
    api = find_api()
    import httpx
    from prefect.client.orchestration import get_client

    from functa.flows.server.session import quiet_console

    quiet_console()
    with using(api):
        try:
            with get_client(sync_client=True) as client:
                check_deployment(client, api)
                wait_for_workers(client, api, text_console())
        except httpx.HTTPError as error:
            raise OperateError(f"{api}: {one_line(error)}") from None
        yield


def find_api() -> str:
    """Return the API of the configured server, or of `functa up` on its default port."""
    api = configured_api() or local_api(PORT)
    if healthy(api):
        if fault := password_fault(api):
            raise OperateError(f"{api} {fault}")
        return api
    where = "which PREFECT_API_URL names" if configured_api() else "and PREFECT_API_URL names no other"
    raise OperateError(f"no Prefect server answers at {api}, {where}: start one with `functa up`")


def check_deployment(client: "SyncPrefectClient", api: str) -> None:
    """Raise OperateError if the deployment does not exist."""
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound:
        raise OperateError(
            f"{api} has no deployment '{DEPLOYMENT}': make it with `python -m functa.deploy.bootstrap` "
            "(`functa up` does)"
        ) from None


def unpolled_queues(client: "SyncPrefectClient") -> list[str]:
    """Return the queues that no worker has recently asked for work."""
    since = datetime.now(UTC) - POLLED_WITHIN
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=POOL)}
    missing = []
    for name in QUEUES:
        polled = queues[name].last_polled if name in queues else None
        if polled is None or polled < since:
            missing.append(name)
    return missing


def wait_for_workers(client: "SyncPrefectClient", api: str, console: Console) -> None:
    """Wait until every queue has a worker: one may just be starting. Raises OperateError after WORKER_SECONDS."""
    began = time.monotonic()
    with console.status("") as status:
        while missing := unpolled_queues(client):
            waited = time.monotonic() - began
            if waited > WORKER_SECONDS:
                raise OperateError(
                    f"no worker polls queue {' or '.join(missing)} of pool '{POOL}' at {api} in {WORKER_SECONDS} s: "
                    f"start one with `prefect worker start --pool {POOL}`, or all with `functa up`"
                )
            status.update(f"Waiting for a worker on queue {', '.join(missing)}: {waited:.0f} of {WORKER_SECONDS} s")
            time.sleep(POLL_SECONDS)


def trigger(config: PipelineConfig, root: str, from_root: str | None) -> "FlowRun":
    """Start a run of the deployment; relative folders are those of this shell, not the worker's."""
    from prefect.deployments import run_deployment
    from prefect.exceptions import PrefectHTTPStatusError

    parameters = {
        "config": with_absolute_images(config).model_dump(mode="json"),
        "root": absolute(root),
        "from_root": absolute(from_root) if from_root else None,
    }
    try:
        run: FlowRun = run_deployment(  # type: ignore[assignment]  # Prefect's type adds what async callers get
            DEPLOYMENT,
            flow_run_name=f"pipeline {config.name}",  # as it will call itself: what is printed here is found there
            parameters=parameters,
            timeout=0,
            as_subflow=False,
        )
    except PrefectHTTPStatusError as error:
        detail = error.response.json().get("detail", "") if error.response.status_code == 409 else str(error)
        raise OperateError(
            f"the server refused the run: {' '.join(detail.split())}; if its deployments are older than this checkout, "
            "renew them with `python -m functa.deploy.bootstrap`"
        ) from None
    return run


def run_address(api: str, run_id: "UUID") -> str:
    """Return the run's page, in the UI that this server shows by default (the old addresses open the old UI)."""
    served, password = api.removesuffix("/api"), password_of(api)
    base = os.environ.get("PREFECT_UI_URL", served).rstrip("/")  # a container reaches the API by another name
    try:
        settings = json.loads(fetch(f"{served}/ui-settings", password=password))
        path = settings[f"{settings['default_ui']}_base_url"].rstrip("/")
    except (OSError, ValueError, KeyError, AttributeError):
        path = ""
    return f"{base}{path}/runs/flow-run/{run_id}"


class ServerSilent(Exception):
    """The server has not answered for longer than SILENCE_SECONDS."""


def watch(client: "SyncPrefectClient", run_id: "UUID") -> "Iterator[FlowRun | None]":
    """Yield the run every few seconds, the last time in its final state; None while the server does not answer.

    A server may be away for a while: workers go on without it. Raises ServerSilent.
    """
    import httpx

    answered = time.monotonic()
    while True:
        run: FlowRun | None = None
        try:
            run = client.read_flow_run(run_id)
            answered = time.monotonic()
        except httpx.HTTPError as error:  # also from a proxy in front of a server that starts again
            silence = time.monotonic() - answered
            if silence > SILENCE_SECONDS:
                raise ServerSilent(
                    f"the server has not answered for {silence:.0f} s ({type(error).__name__})"
                ) from None
        yield run
        if run is not None and run.state is not None and run.state.is_final():
            return
        time.sleep(POLL_SECONDS)


def follow(client: "SyncPrefectClient", run_id: "UUID", address: str, console: Console) -> "State":
    """Show a line for each change of a stage's state, and the newest line of the log; return the run's final state."""
    import httpx

    console.print("Ctrl-C stops following; the run goes on.")
    began, states = time.monotonic(), dict[str, str]()
    printed = began
    final: State | None = None
    try:
        with console.status("") as status:
            for run in watch(client, run_id):
                seconds = f"{time.monotonic() - began:.0f} s"
                if run is None:
                    status.update(f"The server does not answer; {seconds}")
                    continue
                final = run.state
                with suppress(httpx.HTTPError):  # the next look comes soon
                    children = _children(client, run_id)
                    for child in children:
                        if states.get(child.name) != state_name(child):
                            states[child.name] = state_name(child)
                            console.print(f"{child.name}: {states[child.name]}, {seconds}")
                    line = _newest_line(client, [run_id, *(child.id for child in children)])
                    status.update(f"{state_name(run)}, {seconds}: {line}")
                    if line and not console.is_terminal and time.monotonic() - printed > LINE_SECONDS:
                        printed = time.monotonic()
                        console.print(f"{line}, {seconds}", soft_wrap=True)
    except ServerSilent as error:
        raise OperateError(f"{error}; the run may go on: {address}") from None
    except KeyboardInterrupt:
        console.print(f"The run goes on; cancel it on its page: {address}", soft_wrap=True)
        raise SystemExit(130) from None
    assert final is not None  # what watch yields last
    return final


def state_name(run: "FlowRun") -> str:
    """Return Running, Completed, ..."""
    return (run.state and run.state.name) or "Pending"


def _children(client: "SyncPrefectClient", run_id: "UUID") -> "list[FlowRun]":
    """Return the runs of stages, in the order in which they were created."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

    parent = FlowRunFilterParentFlowRunId(any_=[run_id])
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    return sorted(found, key=lambda child: str(child.created))


def _newest_line(client: "SyncPrefectClient", runs: "list[UUID]") -> str:
    """Return the newest line of these runs' logs; empty where there is none yet."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=runs))
    found = client.read_logs(log_filter=chosen, limit=1, sort=LogSort.TIMESTAMP_DESC)
    return " ".join(found[0].message.split()) if found else ""
