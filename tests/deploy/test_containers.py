"""Compose, images, Kubernetes job template and Helm values, as far as no container engine is needed."""

import asyncio
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import functa
from functa.flows.server.api import POOL, QUEUES
from tests.helpers.flows.prefect_server import PROJECT

DEPLOY = PROJECT / "deploy"
COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = ("FUNCTA_AUTH", "FUNCTA_POSTGRES_PASSWORD", "FUNCTA_REDIS_PASSWORD")
EXAMPLE = (DEPLOY / ".env.example").read_text()
DOCKERFILES = {name: (DEPLOY / f"Dockerfile.{name}").read_text() for name in ("cpu", "gpu", "server")}
TEMPLATE = json.loads((DEPLOY / "kubernetes" / "base-job-template.json").read_text())
HELM = {
    name: yaml.safe_load((DEPLOY / "helm" / f"prefect-{name}-values.yaml").read_text()) for name in ("server", "worker")
}
VERSION = functa.__version__


def locked(path: Path) -> dict[str, str]:
    """Return the locked versions by package."""
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", path.read_text(), re.MULTILINE))


PROJECT_LOCK = locked(PROJECT / "requirements.lock")
SERVER_LOCK = locked(DEPLOY / "requirements-server.lock")


def instructions(dockerfile: str, kind: str) -> list[str]:
    """Return the arguments of each instruction of a kind, continued lines joined, comments removed."""
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [" ".join(line.split()[1:]) for line in lines.splitlines() if line.split()[:1] == [kind]]


def options(command: list[str]) -> dict[str, str]:
    """Return the --name VALUE pairs of a worker's command."""
    return {name: value for name, value in pairwise(command) if name.startswith("--")}


# Compose


def test_every_published_port_is_this_machines_own() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.attacks
def test_every_secret_is_a_required_variable_and_has_no_default() -> None:
    for name in SECRETS:
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", COMPOSE_TEXT)
        assert uses and all(use.startswith(":?") for use in uses), name
        assert re.search(rf"^{name}=$", EXAMPLE, re.MULTILINE), f"{name} is empty in .env.example"


def test_no_secret_is_written_in_clear() -> None:
    secret = re.compile("password|auth|secret|_url$|access_key", re.IGNORECASE)
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            address = str(value).startswith(("http://server:", "http://127.0.0.1:", "${FUNCTA_UI_API:-"))
            if secret.search(key) and value is not None and not address:
                assert re.fullmatch(r"(redis://:)?\$\{FUNCTA_\w+:\?[^}]*\}(@redis:6379/\d)?", value), f"{name}: {key}"


@pytest.mark.attacks
def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        image = service["image"]
        assert re.search(r":\d+\.\d+", image), f"{name}: {image}"
        if image.startswith("functa-"):
            assert image.endswith(f":{VERSION}")
    built = {service["image"] for service in SERVICES.values() if "build" in service}
    assert {service["image"] for service in SERVICES.values() if service["image"].startswith("functa-")} == built


def test_each_queue_has_a_worker_and_only_those_of_gpu_have_a_limit() -> None:
    workers = {name: options(SERVICES[name]["command"]) for name in SERVICES if name.startswith("worker-")}
    assert {worker["--work-queue"] for worker in workers.values()} == set(QUEUES)
    for name, worker in workers.items():
        assert worker["--pool"] == POOL and worker["--type"] == "process" and worker["--install-policy"] == "never"
        assert worker.get("--limit") == ("1" if worker["--work-queue"] == "gpu" else None), name
        assert ("CUDA_VISIBLE_DEVICES" in SERVICES[name]["environment"]) == (worker["--work-queue"] == "gpu"), name
        assert SERVICES[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30", name


def test_workers_reach_neither_postgres_nor_redis() -> None:
    assert COMPOSE["networks"]["back"]["internal"] is True
    behind = {name for name, service in SERVICES.items() if "back" in service["networks"]}
    assert behind == {"postgres", "redis", "server", "services"}


def test_everything_that_lasts_is_watched_restarted_and_bounded_in_its_log() -> None:
    for name, service in SERVICES.items():
        assert service["logging"] == {"driver": "local"}
        assert service["restart"] == ("no" if name == "bootstrap" else "unless-stopped")
        assert name in ("bootstrap", "services") or "test" in service["healthcheck"], name


def test_server_and_services_share_state_outside_their_memory() -> None:
    """The settings name modules of prefect-redis; if that is installed, they are imported."""
    for name in ("server", "services"):
        environment = SERVICES[name]["environment"]
        modules = [value for value in environment.values() if value.startswith("prefect_redis.")]
        assert sorted(modules) == [
            f"prefect_redis.{m}" for m in ("cleanup_queue", "lease_storage", "messaging", "messaging", "ordering")
        ]
        assert environment["PREFECT_SERVER_DOCKET_URL"].startswith("redis://")


def test_prefect_knows_every_setting_that_is_made() -> None:
    from prefect.settings import Settings

    known = settings_of(Settings)
    made = {key for service in SERVICES.values() for key in service.get("environment", {})}
    made |= {entry["name"] for entry in HELM["server"]["server"]["env"] + HELM["worker"]["worker"]["extraEnvVars"]}
    made = {
        key
        for key in made
        if key.startswith("PREFECT_") and not key.startswith(("PREFECT_REDIS_", "PREFECT_INTEGRATIONS_"))
    }
    assert made and not {key for key in made if key.lower() not in known}


def settings_of(model: Any) -> set[str]:
    """Return the names, in lower case, of all environment variables that Prefect's settings read."""
    from pydantic import AliasChoices

    names: set[str] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices):
            names |= {str(choice).lower() for choice in field.validation_alias.choices}
        names.add(f"{model.model_config['env_prefix']}{name}".lower())
        if hasattr(field.annotation, "model_fields"):
            names |= settings_of(field.annotation)
    return names


def compose_command() -> list[str]:
    """Return the command of docker compose on this machine; empty if there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return []


@pytest.mark.skipif(not compose_command(), reason="no docker compose here")
@pytest.mark.parametrize("profile", ["gpu", "no-gpu"])
def test_compose_accepts_the_file_with_the_secrets_alone(tmp_path: Path, profile: str) -> None:
    filled = tmp_path / "env"
    command = [*compose_command(), "-f", str(DEPLOY / "compose.yaml"), "--env-file", str(filled)]
    filled.write_text(EXAMPLE)
    refused = subprocess.run([*command, "config", "--quiet"], capture_output=True, text=True)
    assert refused.returncode and "set it in deploy/.env" in refused.stderr
    filled.write_text("".join(f"{name}=word\n" for name in SECRETS))
    accepted = [*command, "--profile", profile, "config", "--format", "json"]
    parsed = json.loads(subprocess.run(accepted, capture_output=True, text=True, check=True).stdout)
    assert set(SERVICES) - set(parsed["services"]) == {"worker-no-gpu" if profile == "gpu" else "worker-gpu-0"}
    assert [port["host_ip"] for port in parsed["services"]["server"]["ports"]] == ["127.0.0.1"]


# Images


@pytest.mark.attacks
@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_without_rights_from_hashes_alone(name: str) -> None:
    text = DOCKERFILES[name]
    assert instructions(text, "USER")[-1] == "1000"  # a number: Kubernetes checks no name
    assert re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-\S+", instructions(text, "FROM")[0])
    assert not instructions(text, "ADD")
    for run in instructions(text, "RUN"):
        assert "curl" not in run and "wget" not in run
        for install in re.findall(r"pip install (.*?)(?: &&|$)", run):
            assert "--require-hashes -r" in install or "--no-deps --no-build-isolation" in install


def test_the_images_of_the_project_differ_in_their_environment_alone() -> None:
    cpu, gpu = (
        [line for line in DOCKERFILES[name].splitlines() if not line.startswith("#")] for name in ("cpu", "gpu")
    )
    differing = [line for line in {*cpu, *gpu} if (line in cpu) != (line in gpu)]
    assert all(line.startswith("ENV ") for line in differing)
    assert not any("NVIDIA_VISIBLE_DEVICES" in line for line in differing), "a pod without a device would see them all"


def test_the_images_of_the_project_hold_all_of_its_packages() -> None:
    wanted = {"functa"} | {path.name for path in (PROJECT / "functa").iterdir() if path.is_symlink()}
    assert {"flows", "tasks", "models", "storage", "deploy"} <= wanted
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    for name in ("cpu", "gpu"):
        assert wanted <= {copied.split()[0] for copied in instructions(DOCKERFILES[name], "COPY")}
    assert {f"!{package}" for package in wanted} <= set(ignored)
    assert ignored[1] == "*" and "**/.env" in ignored  # nothing enters unless it is named, secrets not even then


# Versions


def test_server_and_project_have_the_same_versions_of_shared_packages() -> None:
    assert SERVER_LOCK.keys() - PROJECT_LOCK.keys() == {"prefect-redis"}
    shared = SERVER_LOCK.keys() & PROJECT_LOCK.keys()
    assert {name: SERVER_LOCK[name] for name in shared} == {name: PROJECT_LOCK[name] for name in shared}


def test_one_version_of_prefect_everywhere() -> None:
    prefect = PROJECT_LOCK["prefect"]
    assert SERVER_LOCK["prefect"] == prefect
    assert f"prefect=={prefect}\n" in (DEPLOY / "requirements-server.in").read_text()
    assert HELM["worker"]["worker"]["image"]["prefectTag"].startswith(f"{prefect}-")


@pytest.mark.attacks
def test_locks_name_no_address() -> None:
    assert not re.search(r"https?://|--index|--find-links", (DEPLOY / "requirements-server.lock").read_text())


# Kubernetes


def rendered(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the job that Prefect's own functions make of the template with a run's variables."""
    from prefect.workers.base import BaseJobConfiguration

    class Configuration(BaseJobConfiguration):
        job_manifest: dict[str, Any]

    # No block is named, so no server is asked.
    made = asyncio.run(Configuration.from_template_and_values(TEMPLATE, variables, client=object()))  # type: ignore[arg-type]
    return made.job_manifest


def test_prefect_accepts_the_job_template() -> None:
    """The server's own check refuses a placeholder without a variable."""
    from prefect.server.schemas.actions import validate_base_job_template

    assert validate_base_job_template(TEMPLATE) == TEMPLATE
    lacking = json.loads(json.dumps(TEMPLATE))
    del lacking["variables"]["properties"]["gpu_limit"]
    with pytest.raises(ValueError, match="gpu_limit"):
        validate_base_job_template(lacking)


@pytest.mark.parametrize(
    ("variables", "limits"),
    [
        ({"gpu_limit": 1}, {"nvidia.com/gpu": 1}),
        ({"gpu_limit": 2, "memory_limit": "32Gi"}, {"nvidia.com/gpu": 2, "memory": "32Gi"}),
        ({"gpu_limit": 0}, {"nvidia.com/gpu": 0}),
        ({"gpu_limit": None}, {"nvidia.com/gpu": None}),  # Kubernetes reads null as 0
        ({}, {}),
    ],
)
def test_a_pod_has_the_devices_that_its_deployment_asks_for(variables: dict[str, Any], limits: dict[str, Any]) -> None:
    container = rendered(variables)["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == limits
    assert "{{" not in json.dumps(container["resources"])


def test_each_stages_pod_has_one_device_and_the_waiting_pipelines_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """deploy/prefect.yaml itself asks for them."""
    from functa.deploy.bootstrap import Target, render

    for name in ("FUNCTA_ROOT", "FUNCTA_CRON"):
        monkeypatch.setenv(name, "")
    document = render(yaml.safe_load((DEPLOY / "prefect.yaml").read_text()), Target("root"))
    for deployment in document["deployments"]:
        pool = deployment["work_pool"]
        limits = rendered(pool.get("job_variables", {}))["spec"]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ]
        assert limits.get("nvidia.com/gpu", 0) == (1 if pool["work_queue_name"] == "gpu" else 0)


def test_pods_run_without_rights_and_have_their_secrets_by_reference() -> None:
    pod = rendered({})["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["envFrom"] == [{"secretRef": {"name": "functa-environment", "optional": True}}]
    assert container["image"] == f"functa-gpu:{VERSION}"


# Helm


def test_helm_values_name_the_pool_its_queues_and_secrets_by_reference() -> None:
    worker, server = HELM["worker"]["worker"], HELM["server"]["server"]
    assert worker["config"]["workPool"] == POOL and worker["config"]["workQueues"] == list(QUEUES)
    assert worker["config"]["type"] == "kubernetes" and "limit" not in worker["config"]
    assert server["basicAuth"] == {"enabled": True, "existingSecret": "functa-auth"}
    assert HELM["server"]["global"]["prefect"]["image"]["prefectTag"] == VERSION
    for entry in server["env"] + worker["extraEnvVars"]:
        if "AUTH_STRING" in entry["name"] and "SECRET" not in entry["name"]:
            assert "value" not in entry and entry["valueFrom"]["secretKeyRef"]["name"] == "functa-auth"
    heartbeat = {"name": "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "value": "30"}
    assert heartbeat in worker["extraEnvVars"]
