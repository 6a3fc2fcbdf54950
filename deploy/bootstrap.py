"""Work pool, queues and deployments on the server at PREFECT_API_URL. Run twice, it changes nothing.

python -m deploy.bootstrap [--root URI]       (from the project's folder; `functa up` does it by itself)
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL
from prefect.utilities.templating import apply_values

from flows.config import ConfigError, load_config

PROJECT = Path(__file__).resolve().parents[1]
PREFECT_FILE = PROJECT / "deploy" / "prefect.yaml"
POOL_TYPE = "process"


class BootstrapError(Exception):
    """The server refused something, or cannot be reached: one line."""


def bootstrap(root: str) -> dict[str, list[str]]:
    """Create what is missing, bring the rest up to date; returns {"pools", "queues", "deployments"} by name."""
    document = render(yaml.safe_load(PREFECT_FILE.read_text()), root)
    queues: dict[str, list[str]] = {}
    for deployment in document["deployments"]:
        pool = deployment["work_pool"]
        wanted = queues.setdefault(pool["name"], [])
        if pool["work_queue_name"] not in wanted:
            wanted.append(pool["work_queue_name"])
    if not PREFECT_API_URL.value():
        raise BootstrapError("PREFECT_API_URL is not set: name a server, or start one with `functa up`")
    with get_client(sync_client=True) as client:
        if fault := client.api_healthcheck():
            raise BootstrapError(f"{client.api_url}: no Prefect server answers ({fault}); set PREFECT_API_URL to one")
        for pool_name, names in queues.items():
            create_pool(client, pool_name, names)
    deploy(document)
    return {
        "pools": list(queues),
        "queues": [name for names in queues.values() for name in names],
        "deployments": [deployment["name"] for deployment in document["deployments"]],
    }


def render(document: dict[str, Any], root: str) -> dict[str, Any]:
    """prefect.yaml with this machine's folders, and the preset as every deployment's `config` parameter."""
    os.environ["FUNCTA_PROJECT"] = str(PROJECT)
    os.environ["FUNCTA_ROOT"] = root
    config = load_config(document["definitions"]["preset"]).model_dump(mode="json")
    deployments = [d | {"parameters": {"config": config} | d.get("parameters", {})} for d in document["deployments"]]
    return cast(dict[str, Any], apply_values(document | {"deployments": deployments}, {}, remove_notset=False))


def create_pool(client: SyncPrefectClient, pool: str, queues: list[str]) -> None:
    """The pool and its queues, where they are missing; an operator's limits on existing ones stay."""
    try:
        client.create_work_pool(WorkPoolCreate(name=pool, type=POOL_TYPE, description="Spatial functa's workers."))
    except ObjectAlreadyExists:
        found = client.read_work_pool(pool).type
        if found != POOL_TYPE:
            raise BootstrapError(
                f"work pool '{pool}' is of type '{found}', not '{POOL_TYPE}': delete or rename it"
            ) from None
    standing = {queue.name for queue in client.read_work_queues(work_pool_name=pool)}
    for queue in queues:
        if queue not in standing:
            client.create_work_queue(queue, work_pool_name=pool)


def deploy(document: dict[str, Any]) -> None:
    """`prefect deploy --all`, so that every key of prefect.yaml means what Prefect says it means."""
    with tempfile.TemporaryDirectory() as folder:
        rendered = Path(folder) / "prefect.yaml"
        rendered.write_text(yaml.safe_dump(document, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(rendered)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise BootstrapError(f"prefect deploy failed: {last_line(done.stderr) or last_line(done.stdout)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main() -> int:
    """Exit status 0 done, 1 the server, 2 the preset."""
    parser = argparse.ArgumentParser(prog="python -m deploy.bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=str(PROJECT / "functa-runs" / "digits"), help="where runs go by default")
    arguments = parser.parse_args()
    try:
        made = bootstrap(arguments.root)
    except (BootstrapError, ConfigError) as error:
        sys.stderr.write(f"bootstrap: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    sys.stdout.write("; ".join(f"{what}: {', '.join(names)}" for what, names in made.items()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
