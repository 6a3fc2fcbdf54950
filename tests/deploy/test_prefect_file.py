"""deploy/prefect.yaml and its bootstrap, as far as no server is needed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.prefect_server import PROJECT, clean_environment, free_port

SET_FOLDER = "prefect.deployments.steps.set_working_directory"
DOCUMENT = yaml.safe_load((PROJECT / "deploy" / "prefect.yaml").read_text())


def rendered(root: str, monkeypatch: pytest.MonkeyPatch, folder: str | None = None) -> dict[str, Any]:
    from functa.deploy.bootstrap import Target, render

    for name in ("FUNCTA_ROOT", "FUNCTA_CRON"):
        monkeypatch.setenv(name, "")  # render sets them; monkeypatch takes them back
    return render(DOCUMENT, Target(root, cron="30 2 * * 1", folder=folder))


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {deployment["name"]: deployment for deployment in rendered("root", monkeypatch)["deployments"]}


def test_every_entrypoint_is_a_module_path_of_a_flow_of_the_deployments_name(deployments: dict[str, Any]) -> None:
    from prefect.flows import load_flow_from_entrypoint

    assert list(deployments) == ["pipeline", *(stage.command for stage in STAGES.values()), "work-group", "re-encode"]
    for name, deployment in deployments.items():
        assert ":" not in deployment["entrypoint"]  # a worker needs no checkout
        assert load_flow_from_entrypoint(deployment["entrypoint"]).name == name


def test_the_pipeline_waits_on_cpu_and_the_stages_run_on_gpu(deployments: dict[str, Any]) -> None:
    queues = {name: deployment["work_pool"]["work_queue_name"] for name, deployment in deployments.items()}
    assert queues.pop("pipeline") == "cpu"
    assert set(queues.values()) == {"gpu"}
    assert {deployment["work_pool"]["name"] for deployment in deployments.values()} == {"functa"}


def test_rendering_fills_in_root_and_a_config_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    document = rendered("s3://bucket/runs", monkeypatch)
    assert document["pull"] == []
    assert rendered("s3://bucket/runs", monkeypatch, folder="/data")["pull"] == [{SET_FOLDER: {"directory": "/data"}}]
    for deployment in document["deployments"]:
        if deployment["name"] == "work-group":  # whose parameters its parent gives
            continue
        assert deployment["parameters"]["root"] == "s3://bucket/runs"
        if deployment["name"] != "re-encode":  # which goes by what its root was encoded with
            assert PipelineConfig.model_validate(deployment["parameters"]["config"]) == load_config("digits")
    (schedule,) = document["deployments"][-1]["schedules"]
    assert schedule["cron"] == "30 2 * * 1"
    left = [line for line in yaml.safe_dump(document).splitlines() if "{{" in line]
    assert [line.split("{{ ")[1].split()[0] for line in left] == ["event.payload.images", "event.payload.root"]


def test_arrivals_ask_for_what_the_command_emits(deployments: dict[str, Any]) -> None:
    from functa.flows.cli.notify import DEPLOYMENT, EVENT

    (trigger,) = deployments["re-encode"]["triggers"]
    assert trigger["expect"] == [EVENT]
    assert DEPLOYMENT == "re-encode/re-encode"
    assert deployments["re-encode"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--gpus=0", "0: expected a whole number from 1"),
        ("--cron=at noon", "'at noon' is no cron expression"),
        ("--job-template=nowhere.json", "nowhere.json: no JSON file"),
        ("--type=cloud", "invalid choice"),
    ],
)
def test_a_wrong_option_of_bootstrap_is_reported_before_a_server_is_asked(
    option: str, expected: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "functa.deploy.bootstrap", option],
        cwd=PROJECT, env=clean_environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert expected in done.stderr


def test_parameters_fit_the_flows_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server checks the same when the form is submitted."""
    from prefect.flows import load_flow_from_entrypoint

    for deployment in rendered("root", monkeypatch)["deployments"]:
        if deployment["name"] == "work-group":
            continue
        flow = load_flow_from_entrypoint(deployment["entrypoint"])
        flow.validate_parameters(deployment["parameters"])


@pytest.mark.parametrize(
    ("url", "expected"), [(None, "PREFECT_API_URL is not set"), ("dead", "no Prefect server answers")]
)
def test_bootstrap_without_a_server_is_one_line(tmp_path: Path, url: str | None, expected: str) -> None:
    environment = clean_environment(tmp_path)
    if url:
        environment["PREFECT_API_URL"] = f"http://127.0.0.1:{free_port()}/api"
    done = subprocess.run(
        [sys.executable, "-m", "functa.deploy.bootstrap"], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.attacks
def test_no_parameter_or_variable_looks_like_a_secret() -> None:
    text = (PROJECT / "deploy" / "prefect.yaml").read_text().lower()
    keys = [line.split(":")[0] for line in text.splitlines() if ":" in line and not line.lstrip().startswith("#")]
    assert not [key for key in keys if any(word in key for word in ("password", "token", "secret", "key"))]
    assert os.sep + "work" + os.sep not in text  # no folder of one machine
