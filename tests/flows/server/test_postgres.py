"""Orchestration on Postgres, which a shared server wants: the pipeline on a real database (`make test-postgres`)."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from functa.tasks.stage_table import STAGES
from tests.helpers.debian import install
from tests.helpers.flows.prefect_server import PROJECT, free_port
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.flows.worker_cluster import Cluster, cluster

pytestmark = [pytest.mark.postgres, pytest.mark.server, pytest.mark.timeout(900)]

RUN = """
import sys
from functa.flows.config.load import load_config
from functa.flows.server.deployed import run_deployed
state = run_deployed(load_config("digits", sys.argv[2:]), sys.argv[1])
sys.exit(not state.is_completed())
"""


def programs() -> Path | None:
    """Debian's folder of the newest Postgres."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A connection URL of a server with an empty database, on loopback alone."""
    if programs() is None:
        install("postgresql")
    folder = programs()
    assert folder is not None
    port, place = free_port(), Path(tempfile.mkdtemp(prefix="functa-postgres-"))
    run = as_owner(place)
    try:
        (place / "password").write_text("of-the-test")
        place_of = ["-D", str(place / "data")]
        options = ["--auth=scram-sha-256", "--username=functa", f"--pwfile={place / 'password'}"]
        subprocess.run([*run, folder / "initdb", *place_of, *options], check=True, capture_output=True, cwd="/")
        loopback = ["-h", "127.0.0.1", "-p", str(port), "-k", str(place)]
        server = subprocess.Popen([*run, folder / "postgres", *place_of, *loopback], cwd="/", stderr=subprocess.DEVNULL)
        try:
            ready = [folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-t", "60"]
            while subprocess.run(ready, capture_output=True).returncode:
                assert server.poll() is None, "Postgres ended"
            yield f"postgresql+asyncpg://functa:of-the-test@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait(60)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def as_owner(place: Path) -> list[str]:
    """Return the prefix that runs a command as the folder's owner: Postgres refuses the root user."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    os.chown(place, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


@pytest.fixture(scope="module")
def workplace(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, PREFECT_API_DATABASE_CONNECTION_URL=database) as running:
        running.start_worker("cpu")
        running.start_worker("gpu", "0")
        yield running


def test_the_pipeline_runs_through_its_deployments(workplace: Cluster) -> None:
    root = workplace.folder / "tiny"
    command = [sys.executable, "-c", RUN, str(root), *TINY]
    done = subprocess.run(
        command, cwd=PROJECT, env=workplace.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr + workplace.log("gpu-0")[-4000:]
    names = {flow["id"]: flow["name"] for flow in workplace.ask("flows/filter", {})}
    runs = {names[run["flow_id"]]: run for run in workplace.ask("flow_runs/filter", {})}
    for stage in STAGES:
        run = runs[stage.replace("_", "-")]
        assert (run["state_type"], run["work_queue_name"]) == ("COMPLETED", "gpu")
    assert (root / "report.html").exists()
    assert not (workplace.folder / "home" / "prefect.db").exists(), "it was SQLite after all"


def test_bootstrap_again_changes_nothing(workplace: Cluster) -> None:
    def existing() -> list[object]:
        kinds = ("deployments", "work_pools", "automations", "v2/concurrency_limits")
        return [sorted(row["name"] for row in workplace.ask(f"{kind}/filter", {})) for kind in kinds]

    before = existing()
    workplace.bootstrap("--gpus", "2")
    assert existing() == before
