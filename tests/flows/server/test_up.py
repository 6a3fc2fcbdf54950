"""Promises to an operator: `functa up` and `functa run --deployment`."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import ConfigError, PipelineConfig
from functa.flows.server import api, deployed, doctor, processes
from functa.flows.server.api import OperateError
from functa.flows.server.up import command_for, link, up
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import StageRecord, write_record
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.prefect_server import PROJECT, Served, eventually, free_port, serving

DEPLOYMENTS = {"pipeline", "re-encode", "work-group"} | {stage.replace("_", "-") for stage in STAGES}


def write_profile(home: Path, **settings: str) -> None:
    home.mkdir()
    lines = "\n".join(f'{name} = "{value}"' for name, value in settings.items())
    (home / "profiles.toml").write_text(f'active = "mine"\n[profiles.mine]\n{lines}\n')


# --- before anything starts


def test_the_command_that_is_suggested_continues_the_root(tmp_path: Path) -> None:
    assert command_for(str(tmp_path)) == f"functa run digits --root {tmp_path} --deployment"
    config = load_config("digits", ["field.width=32"]).model_dump(mode="json")
    ours = f"functa run digits --set field.width=32 --root {tmp_path} --deployment"
    for name, suggested in (("unnamed", f"functa run digits --root {tmp_path} --deployment"), ("digits", ours)):
        record = StageRecord(
            stage="encode", state="finished", config={}, pipeline=config | {"name": name}, inputs={}, output="x",
            started="now",
        )  # fmt: skip
        write_record(open_location(str(tmp_path)), record)
        assert command_for(str(tmp_path)) == suggested


def test_a_taken_port_is_one_line_and_nothing_is_started(home: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(OperateError) as caught:
            up(port)
    assert str(caught.value) == f"port {port} is taken by another program: name a free one, such as --port {port + 1}"
    assert not home.exists()


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_impossible_port_is_wrong_from_the_arguments_alone(home: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port {port}"):
        up(port)


def test_telemetry_is_off_unless_the_user_set_otherwise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_profile(home, PREFECT_SERVER_ANALYTICS_ENABLED="true")
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "7")
    api.prepare_environment()
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "7"
    assert "PREFECT_SERVER_ANALYTICS_ENABLED" not in os.environ


def test_the_api_is_found_in_environment_then_profile_then_nowhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.configured_api() == ""
    write_profile(home, PREFECT_API_URL="http://profile/api/")
    assert api.configured_api() == "http://profile/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://environment/api")
    assert api.configured_api() == "http://environment/api"


def test_embedded_server_is_allowed_only_where_no_api_is_configured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    api.prepare_environment()
    assert "PREFECT_SERVER_EPHEMERAL_ENABLED" not in os.environ
    monkeypatch.delenv("PREFECT_API_URL")
    api.prepare_environment()
    assert os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] == "true"


def test_run_deployed_without_a_server_names_it_and_the_fix(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    with pytest.raises(OperateError, match=r"answers at http://127.*, which PREFECT_API_URL names: .*functa up"):
        deployed.run_deployed(PipelineConfig(), "root")


def test_the_light_commands_load_neither_prefect_nor_torch() -> None:
    code = "import sys, functa.flows.server.up; sys.exit(bool({'prefect', 'torch', 'psutil'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


# --- a real `functa up`; the last test ends it


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("up")) as running:
        yield running


def snapshot(served: Served) -> dict[str, Any]:
    """Return pools, queues and deployments without values that reading or polling changes."""
    volatile = {"updated", "last_polled", "status", "active_slots"}
    tables = {
        "pools": served.ask("work_pools/filter", {}),
        "queues": served.ask("work_queues/filter", {}),
        "deployments": served.ask("deployments/filter", {}),
    }
    for row in tables["deployments"]:  # `prefect deploy` writes a schedule anew
        row["schedules"] = [schedule["schedule"] for schedule in row["schedules"]]
    return {
        name: sorted(({k: v for k, v in row.items() if k not in volatile} for row in rows), key=lambda row: row["id"])
        for name, rows in tables.items()
    }


def bootstrap(served: Served, *options: str) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "functa.deploy.bootstrap",
            "--root",
            str(served.root),
            "--folder",
            str(PROJECT),
            *options,  # the folder that `functa up` was started in
        ],
        cwd=PROJECT,
        env=served.environment(),
        check=True,
    )


@pytest.mark.attacks
@pytest.mark.server
def test_up_serves_on_the_loopback_address_alone(served: Served) -> None:
    assert served.ask("health") is True
    listening = {
        connection.laddr.ip
        for process in served.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.server
def test_up_deploys_every_stage_with_a_run_form_that_is_filled_in(served: Served) -> None:
    deployments = {d["name"]: d for d in served.ask("deployments/filter", {})}
    assert set(deployments) == DEPLOYMENTS
    for name, deployment in deployments.items():
        assert deployment["work_queue_name"] == ("cpu" if name == "pipeline" else "gpu")
        assert deployment["enforce_parameter_schema"]
        assert deployment["description"]
        if name == "work-group":  # whose parameters its parent gives
            continue
        assert deployment["parameters"]["root"] == str(served.root)
        if name != "re-encode":  # which goes by what its root was encoded with
            assert PipelineConfig.model_validate(deployment["parameters"]["config"]) == load_config("digits")


@pytest.mark.server
def test_up_makes_the_limit_the_schedule_the_trigger_and_the_watch(served: Served) -> None:
    from functa.deploy.bootstrap import NIGHTLY, WATCH

    limit = served.ask(f"v2/concurrency_limits/{api.GPU_LIMIT}")
    assert (limit["limit"], limit["active"], limit["active_slots"]) == (1, True, 0)
    (again,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == "re-encode")
    (schedule,) = again["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == (NIGHTLY, True)
    assert again["global_concurrency_limit"]["limit"] == 1
    automations = {each["name"]: each for each in served.ask("automations/filter", {})}
    assert set(automations) == {WATCH, "re-encode when images arrive"}
    assert all(each["enabled"] for each in automations.values())
    of_it = {"flow_runs": {"deployment_id": {"any_": [again["id"]]}}}
    planned = "the server has planned the schedule's runs"
    eventually(lambda: any(run["auto_scheduled"] for run in served.ask("flow_runs/filter", of_it)), 120, planned)


@pytest.mark.server
@pytest.mark.slow
def test_bootstrap_again_changes_nothing_and_restores_what_was_deleted(served: Served) -> None:
    before = snapshot(served)
    (evaluate,) = (d for d in before["deployments"] if d["name"] == "evaluate")
    served.ask(f"deployments/{evaluate['id']}", method="DELETE")
    bootstrap(served)
    after = snapshot(served)
    assert {d["name"] for d in after["deployments"]} == DEPLOYMENTS
    assert after["pools"] == before["pools"]
    assert after["queues"] == before["queues"]
    untouched = {d["id"]: d for d in after["deployments"] if d["name"] != "evaluate"}
    assert untouched == {d["id"]: d for d in before["deployments"] if d["name"] != "evaluate"}


@pytest.mark.server
@pytest.mark.slow
def test_bootstrap_again_leaves_the_watch_and_an_operators_slots(served: Served) -> None:
    """Replacing the watch would drop the runs that it is watching."""

    def existing() -> tuple[str, int]:
        automations = {each["name"]: each for each in served.ask("automations/filter", {})}
        return automations[WATCH]["trigger"]["id"], served.ask(f"v2/concurrency_limits/{api.GPU_LIMIT}")["limit"]

    from functa.deploy.bootstrap import WATCH

    watch, slots = existing()
    bootstrap(served, "--gpus", str(slots + 2))
    bootstrap(served, "--gpus", str(slots), "--at-least")
    assert existing() == (watch, slots + 2)
    bootstrap(served, "--gpus", str(slots))
    assert existing() == (watch, slots)


@pytest.mark.server
def test_pages_of_another_origin_may_not_call_the_server(served: Served) -> None:
    """Its answers are for its own pages."""
    asked = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    own = asked | {"Origin": f"http://127.0.0.1:{served.port}"}
    for headers, allowed in ((asked, False), (own, True)):
        answer = httpx.options(f"http://127.0.0.1:{served.port}/api/flow_runs/filter", headers=headers)
        assert (answer.headers.get("access-control-allow-origin") == headers["Origin"]) == allowed


SOCKET = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": "prefect",
}  # fmt: skip


@pytest.mark.attacks
@pytest.mark.server
@pytest.mark.parametrize("foreign", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}], ids=str)
def test_neither_posts_nor_sockets_of_a_foreign_page_reach_the_server(served: Served, foreign: dict[str, str]) -> None:
    """A simple POST needs no leave of the server, and browsers check no origin of a socket."""
    address = f"http://127.0.0.1:{served.port}/api"
    user = httpx.BasicAuth(*served.password.split(":"))
    assert httpx.post(f"{address}/flows/", json={"name": "own"}, auth=user).status_code in (200, 201)
    assert httpx.post(f"{address}/flows/", json={"name": "foreign"}, headers=foreign, auth=user).status_code == 403
    assert httpx.get(f"{address}/events/out", headers=SOCKET).status_code == 101
    assert httpx.get(f"{address}/events/out", headers=SOCKET | foreign).status_code == 403


@pytest.mark.server
@pytest.mark.attacks
def test_the_password_is_in_no_command_line_log_or_database(served: Served) -> None:
    """The environment of a process, and the file of the password, are its user's alone."""
    secret = served.password.partition(":")[2]
    assert served.link == link(served.port, served.password)
    assert secret in served.link
    assert not [line for process in served.family() for line in process.cmdline() if secret in line]
    kept = [path for path in served.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert kept == [served.home / "functa" / f"password-{served.port}"]


@pytest.mark.server
@pytest.mark.attacks
def test_no_run_reads_or_writes_outside_the_allowed_places(served: Served, tmp_path: Path) -> None:
    outside = str(Path(tmp_path.anchor, "tmp", f"functa-outside-{served.port}"))
    inside = {"root": str(served.root.parent / "another"), "config": load_config("digits").model_dump(mode="json")}
    images = load_config("digits", ["images.source=npz", f"images.location={outside}"]).model_dump(mode="json")
    asked = {
        "meta-train": inside | {"root": outside},
        "encode": inside | {"from_root": f"{served.root}/../../../{Path(outside).name}"},
        "pipeline": inside | {"config": images},
        "re-encode": {"root": outside},
    }
    runs = {name: start_run(served, name, **parameters)["id"] for name, parameters in asked.items()}
    for name, run in runs.items():
        eventually(lambda run=run: served.ask(f"flow_runs/{run}")["state_type"] == "FAILED", 120, f"{name} is refused")
        assert (
            "is in none of the locations that FUNCTA_ALLOWED_ROOTS"
            in served.ask(f"flow_runs/{run}")["state"]["message"]
        )
    assert not Path(outside).exists()


@pytest.mark.server
def test_no_telemetry_and_no_advertisement(served: Served) -> None:
    settings = served.ask("admin/settings")["server"]
    assert settings["analytics_enabled"] is False
    assert settings["ui"]["show_promotional_content"] is False


@pytest.mark.server
def test_a_second_up_on_the_port_is_one_line(served: Served, home: Path) -> None:
    with pytest.raises(OperateError, match=f"^port {served.port} is taken by a Prefect server: .*$"):
        up(served.port)


@pytest.mark.server
def test_run_deployed_names_the_queue_that_no_worker_polls(
    served: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{served.address}/api")
    monkeypatch.setenv("PREFECT_HOME", str(served.home))
    monkeypatch.setattr(deployed, "QUEUES", ("cpu", "lonely"))
    monkeypatch.setattr(deployed, "WORKER_SECONDS", 1)
    with pytest.raises(OperateError, match="no worker polls queue lonely of pool 'functa'"):
        deployed.run_deployed(PipelineConfig(), "root")


@pytest.mark.server
def test_a_command_without_the_password_is_one_line_with_the_fix(
    served: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{served.address}/api")
    for password, fault in (("", "asks for a password"), ("functa:wrong", "refuses the password of")):
        monkeypatch.setenv(api.PASSWORD, password)
        for command in (api.check_api, lambda: deployed.run_deployed(PipelineConfig(), "root")):
            with pytest.raises(OperateError, match=f"{served.address}/api {fault}.*: set {api.PASSWORD} to") as caught:
                command()
            assert "\n" not in str(caught.value)
        assert not doctor.check_prefect().ok
    monkeypatch.delenv(api.PASSWORD)
    monkeypatch.setenv("PREFECT_HOME", str(served.home))
    assert doctor.check_prefect().ok


@pytest.mark.server
def test_run_deployed_reports_a_missing_deployment(served: Served, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{served.address}/api")
    monkeypatch.setenv("PREFECT_HOME", str(served.home))
    monkeypatch.setattr(deployed, "DEPLOYMENT", "pipeline/elsewhere")
    with pytest.raises(OperateError, match="no deployment 'pipeline/elsewhere': make it with"):
        deployed.run_deployed(PipelineConfig(), "root")


@pytest.mark.server
def test_a_config_out_of_range_is_refused_before_a_worker_sees_it(served: Served) -> None:
    config = load_config("digits").model_dump(mode="json")
    config["inner"]["steps"] = 10_000
    status = start_run(served, "meta-train", config=config, root=str(served.root))
    assert status == 409


def start_run(served: Served, name: str, **parameters: Any) -> Any:
    """Start a run like the run form does; return its row, or the status of the refusal."""
    import urllib.error

    (deployment,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == name)
    try:
        return served.ask(
            f"deployments/{deployment['id']}/create_flow_run",
            {"parameters": parameters, "state": {"type": "SCHEDULED"}},
        )
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.server
def test_ctrl_c_ends_worker_server_and_a_running_stage_and_leaves_no_process(served: Served) -> None:
    config = load_config("digits", ["meta_train.steps=1000000"]).model_dump(mode="json")
    run = start_run(served, "meta-train", config=config, root=str(served.root))
    eventually(lambda: served.ask(f"flow_runs/{run['id']}")["state_type"] == "RUNNING", 90, "the stage runs")
    waiting = start_run(served, "meta-train", config=config, root=str(served.root))  # the worker takes one at a time
    family = served.family()
    assert len(family) >= 4  # up, server, worker, flow run
    served.process.send_signal(signal.SIGINT)
    output, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, output
    assert not [process for process in family if processes.alive(process)]
    assert api.port_fault(served.port) == ""
    with contextlib.closing(sqlite3.connect(served.home / "prefect.db")) as database:
        states = dict(database.execute("select id, state_type from flow_run").fetchall())
    assert states[run["id"]] == "CRASHED"
    assert states[waiting["id"]] == "CANCELLED", "the next `functa up` would start it"
