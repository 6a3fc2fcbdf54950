"""Re-encoding by cron and by event encodes exactly what was added, and two runs do not meet."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from functa.flows.config.load import load_config
from functa.flows.server.api import GPU_LIMIT, PASSWORD
from functa.storage.functaset.functaset import Functaset
from functa.tasks.stage_table import STAGES
from tests.helpers.flows.prefect_server import PROJECT, Served, eventually, serving
from tests.helpers.flows.tiny_config import TINY

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

RUN_SECONDS = 240
MALFORMED = """
import asyncio, os
from prefect.events import Event
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Resource

async def emit():
    resource = Resource({"prefect.resource.id": "functa.root.unknown"})
    async with PrefectEventsClient(os.environ["PREFECT_API_URL"]) as client:
        await client.emit(Event(event="functa.images.arrived", resource=resource, payload={"folder": "somewhere"}))

asyncio.run(emit())
"""
EVERY_MINUTE = "* * * * *"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("up"), devices="0,1", cron=EVERY_MINUTE) as running:
        pause(running, True)
        yield running


@pytest.fixture(scope="module")
def images(served: Served) -> Path:
    """A folder of images; the deployments' own root has encoded it."""
    folder = served.root.parent / "images"
    for number in range(40):
        add(folder, f"train/{'ab'[number % 2]}/{number:03d}.png", number)
    for number in range(8):
        add(folder, f"test/{'ab'[number % 2]}/{number:03d}.png", 1000 + number)
    sets = ["images.limit=null", "images.source=folder", f"images.location={folder}", "images.channels=1"]
    config = load_config("digits", [*TINY, *sets, "encode.quantization.max_clip_fraction=1"])
    parameters = {"root": str(served.root), "config": config.model_dump(mode="json")}
    for stage in ("meta-train", "encode"):
        assert end_of(served, start(served, stage, parameters))["type"] == "COMPLETED"
    return folder


def add(folder: Path, name: str, seed: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)).save(path)


def deployment(served: Served, name: str) -> dict[str, Any]:
    (found,) = (d for d in served.ask("deployments/filter", {}) if d["name"] == name)
    return dict(found)


def start(served: Served, name: str, parameters: dict[str, Any]) -> str:
    body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
    return str(served.ask(f"deployments/{deployment(served, name)['id']}/create_flow_run", body)["id"])


def runs_of(served: Served, name: str) -> list[dict[str, Any]]:
    """Return the runs that have begun, the latest last."""
    wanted = {"deployment_id": {"any_": [deployment(served, name)["id"]]}}
    runs = served.ask("flow_runs/filter", {"flow_runs": wanted, "sort": "START_TIME_ASC"})
    return [run for run in runs if run["state_type"] != "SCHEDULED"]


def end_of(served: Served, run: str) -> dict[str, Any]:
    def final() -> Any:
        state = served.ask(f"flow_runs/{run}")["state"]
        return state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and state

    return dict(eventually(final, RUN_SECONDS, f"run {run} ends"))


def pause(served: Served, paused: bool) -> None:
    found = deployment(served, "re-encode")
    (schedule,) = found["schedules"]
    served.ask(f"deployments/{found['id']}/schedules/{schedule['id']}", {"active": not paused}, "PATCH")


def keys(served: Served) -> set[str]:
    return set(Functaset.open(f"{served.root}/functaset.zarr").load("train").keys)


def fragments(served: Served) -> dict[str, list[str]]:
    """Return the keys of each fragment, by its name."""
    found = {}
    for plan in (served.root / "functaset.zarr" / "fragments").glob("*/plan.json"):
        found[plan.parent.name] = json.loads(plan.read_text())
    return found


def command(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from functa.flows.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT, env=served.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_cron_starts_a_run_that_encodes_exactly_the_images_added_since(served: Served, images: Path) -> None:
    before = keys(served)
    old = fragments(served)
    added = {f"train/{'ab'[number % 2]}/cron-{number}.png" for number in range(3)}
    for number, name in enumerate(sorted(added)):
        add(images, name, 2000 + number)
    pause(served, False)
    try:
        eventually(lambda: keys(served) != before, RUN_SECONDS, "the schedule's run has encoded the images")
    finally:
        pause(served, True)
    run = runs_of(served, "re-encode")[0]
    assert run["auto_scheduled"]
    assert end_of(served, run["id"])["type"] == "COMPLETED"
    assert keys(served) == before | added
    (new,) = fragments(served).keys() - old.keys()
    assert fragments(served)[new]["rows"] == len(added)


def test_the_event_starts_a_run_that_encodes_exactly_the_images_added_since(served: Served, images: Path) -> None:
    wait_until_idle(served)
    before, old, earlier = keys(served), fragments(served), runs_of(served, "re-encode")
    add(images, "train/a/event.png", 3000)
    (images / "train/b/001.png").unlink()
    done = command(served, "notify", str(served.root), "--images", str(images / "train" / "a"))
    assert done.returncode == 0, done.stderr
    assert "functa.images.arrived" in done.stdout
    run = eventually(lambda: new_run(served, earlier), RUN_SECONDS, "the event starts a run")
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["parameters"] == {"root": str(served.root), "images": str(images / "train" / "a")}
    assert end_of(served, run["id"])["type"] == "COMPLETED"
    assert keys(served) == before - {"train/b/001.png"} | {"train/a/event.png"}
    (new,) = fragments(served).keys() - old.keys()
    assert fragments(served)[new]["rows"] == 1


def new_run(served: Served, earlier: list[dict[str, Any]]) -> dict[str, Any] | None:
    known = {run["id"] for run in earlier}
    return next((run for run in runs_of(served, "re-encode") if run["id"] not in known), None)


def wait_until_idle(served: Served) -> None:
    """Wait until no re-encoding runs or is about to."""
    eventually(
        lambda: all(run["state_type"] not in ("PENDING", "RUNNING") for run in runs_of(served, "re-encode")),
        RUN_SECONDS,
        "nobody encodes",
    )


@pytest.mark.faults
def test_nothing_new_changes_no_byte_and_a_second_run_waits_for_the_first(served: Served, images: Path) -> None:
    wait_until_idle(served)
    before = tree(served.root / "functaset.zarr")
    runs = [start(served, "re-encode", {"root": str(served.root)}) for _ in range(2)]
    seen = []
    while any(served.ask(f"flow_runs/{run}")["state_type"] not in ("COMPLETED", "FAILED", "CRASHED") for run in runs):
        states = [served.ask(f"flow_runs/{run}")["state"]["name"] for run in runs]
        seen.append(states)
        time.sleep(0.5)
    assert [served.ask(f"flow_runs/{run}")["state_type"] for run in runs] == ["COMPLETED"] * 2
    assert ["Running", "Running"] not in seen
    assert any("AwaitingConcurrencySlot" in states for states in seen), seen
    assert tree(served.root / "functaset.zarr") == before


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_malformed_event_is_one_line_on_its_runs_page_and_nothing_else(served: Served, images: Path) -> None:
    wait_until_idle(served)
    before, earlier = tree(served.root / "functaset.zarr"), runs_of(served, "re-encode")
    subprocess.run(
        [sys.executable, "-c", MALFORMED],
        env=served.environment() | {PASSWORD: served.password},
        check=True,
        timeout=120,
    )
    run = eventually(lambda: new_run(served, earlier), RUN_SECONDS, "the event starts a run")
    state = end_of(served, run["id"])
    assert state["type"] == "FAILED"
    assert "an event without payload.root: `functa notify ROOT --images URI` sends" in state["message"]
    assert tree(served.root / "functaset.zarr") == before


def test_notify_refuses_an_event_that_no_run_would_use(served: Served, images: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        ((str(tmp_path), "--images", str(images)), "nothing has been encoded there"),
        (
            (str(served.root), "--images", str(tmp_path)),
            f"images arrived in {tmp_path}, but it reads those in {images}",
        ),
        ((str(served.root), "--images", str(images / "train" / "none")), "is empty or missing; name the folder"),
    ):
        done = command(served, "notify", *arguments)
        assert done.returncode == 1
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_no_device_is_ever_held_twice_and_every_stage_ran_on_queue_gpu(served: Served) -> None:
    """Two pipelines at once: eight stages for two devices."""
    wait_until_idle(served)
    config = load_config("digits", TINY).model_dump(mode="json")
    roots = [served.root.parent / name for name in ("one", "two")]
    runs = [start(served, "pipeline", {"config": config, "root": str(root)}) for root in roots]
    held, slots = [], []
    while any(served.ask(f"flow_runs/{run}")["state_type"] not in ("COMPLETED", "FAILED", "CRASHED") for run in runs):
        held.append(devices_in_use(served))
        slots.append(served.ask(f"v2/concurrency_limits/{GPU_LIMIT}")["active_slots"])
        time.sleep(0.3)
    assert [end_of(served, run)["type"] for run in runs] == ["COMPLETED"] * 2
    assert all(len(devices) == len(set(devices)) for devices in held), held
    assert max(slots) == 2
    assert ["0", "1"] in held
    for root in roots:
        records = [json.loads((root / "stages" / f"{stage}.json").read_text()) for stage in STAGES]
        for record in records:
            assert record["device"] in ("0", "1")
            run = served.ask(f"flow_runs/{record['flow_run']}")
            assert run["work_queue_name"] == "gpu"
            assert run["parent_task_run_id"]


def devices_in_use(served: Served) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES of the processes of flow runs on queue gpu."""
    found = []
    for process in served.family():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "prefect.engine" in " ".join(process.cmdline()):
                found.append(process.environ().get("CUDA_VISIBLE_DEVICES", ""))
    return sorted(device for device in found if "," not in device)  # a pipeline, which computes nothing, sees all
