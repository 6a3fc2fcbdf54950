"""One encoding and one evaluation, shared by the workers of a pool: `dispatch.runner=prefect` on real processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.ledger import images_digest
from functa.storage.images.source import open_images
from functa.storage.places.allowed import ALLOWED_ROOTS
from tests.helpers.flows.finished_stages import change_record, recorded
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.flows.trained_root import trained_root
from tests.helpers.flows.worker_cluster import Cluster, cluster

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]

WORKERS = 3
RUN_SECONDS = 900  # for one encoding on a busy machine
# One image at a time, in many steps, so that a group takes several seconds.
OVERRIDES = [
    *TINY, "images.limit=300", "inner.compile=off", "encode.batch=1", "encode.group_shards=1",
    "field.width=512", "inner.steps=64", "meta_train.steps=1", "meta_train.validation_images=1",
    "encode.quantization.bits=32",
]  # fmt: skip
WAITING = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")


@pytest.fixture(scope="module")
def config() -> PipelineConfig:
    return load_config("digits", OVERRIDES)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, WORKERS, **{ALLOWED_ROOTS: str(folder)}) as running:
        running.start_worker("cpu")
        yield running


@pytest.fixture(scope="module")
def roots(workplace: Cluster) -> Path:
    """Return the folder of the roots, in which `field` has a trained field."""
    folder = workplace.folder / "roots"
    trained_root(folder / "field", *OVERRIDES, stages=("meta_train",))
    return folder


@pytest.fixture
def workers(workplace: Cluster) -> Iterator[list[str]]:
    """Start a worker of its own device each; end them, and runs that a failed test left behind."""
    names = [workplace.start_worker("gpu", str(device)) for device in range(WORKERS)]
    yield names
    for name in names:
        workplace.kill(name)
    for process in workplace.flow_processes():
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(roots: Path) -> dict[str, bytes]:
    """Return the bytes of an encoding by one process."""
    root = roots / "undisturbed"
    trained_root(root, *OVERRIDES, from_root=roots / "field", stages=("encode",))
    return stored(root)


def stored(root: Path) -> dict[str, bytes]:
    """Return the stored arrays by split and path; fragments have other names in each run."""
    found = {}
    for plan in sorted((root / "functaset.zarr" / "fragments").glob("*/plan.json")):
        split = json.loads(plan.read_text())["split"]
        chunks = [file for file in sorted(plan.parent.glob("*/c/**/*")) if file.is_file()]
        found |= {f"{split}/{file.relative_to(plan.parent)}": file.read_bytes() for file in chunks}
    return found


def begin(workplace: Cluster, config: PipelineConfig, roots: Path, name: str) -> str:
    """Start the encoding of a root on the pool; return the run that waits for its groups, on queue cpu."""
    changed = config.model_copy(update={"dispatch": config.dispatch.model_copy(update={"runner": "prefect"})})
    first = workplace.run(
        "encode", root=str(roots / name), from_root=str(roots / "field"), config=changed.model_dump(mode="json")
    )
    assert ends(workplace, first) == ("COMPLETED", "Moved")
    waits = workplace.ask(f"flow_runs/{first}")["state"]["message"].split(" as run ")[1].split()[0]
    assert workplace.ask(f"flow_runs/{waits}")["work_queue_name"] == "cpu"
    return str(waits)


def ends(workplace: Cluster, run: str, seconds: float = RUN_SECONDS) -> tuple[str, str]:
    """Return the type and the name of the run's last state."""
    eventually(lambda: workplace.state(run) not in WAITING, seconds, f"run {run} ends")
    state = workplace.ask(f"flow_runs/{run}")["state"]
    return state["type"], state["name"]


def groups(workplace: Cluster, run: str) -> list[dict[str, Any]]:
    """Return the child runs, as the UI shows them: by the parent that the server keeps."""
    of_it = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "limit": 200}
    found: list[dict[str, Any]] = workplace.ask("flow_runs/filter", of_it)
    assert all(child["parent_task_run_id"] for child in found)
    return found


def devices(workplace: Cluster, runs: list[dict[str, Any]]) -> set[str]:
    """Return the devices that the runs had, each of another worker."""
    chosen = {"logs": {"flow_run_id": {"any_": [run["id"] for run in runs]}}, "limit": 200}
    lines = [line["message"] for line in workplace.ask("logs/filter", chosen)]
    return {line.split()[2] for line in lines if line.startswith("has device ")}


def running(workplace: Cluster, run: str) -> list[dict[str, Any]]:
    return [child for child in groups(workplace, run) if child["state_type"] == "RUNNING"]


def test_all_workers_share_one_encoding_and_its_groups_are_child_runs(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: list[str], undisturbed: dict[str, bytes]
) -> None:
    run = begin(workplace, config, roots, "shared")
    assert ends(workplace, run)[0] == "COMPLETED", workplace.ask(f"flow_runs/{run}")["state"]["message"]
    children = groups(workplace, run)
    planned = sum(child["name"].startswith("encode ") for child in children)
    assert planned == len(list((roots / "shared" / "functaset.zarr").glob("fragments/*/receipts/*"))) >= 8
    assert {child["name"] for child in children} >= {"plan encoding", "encode train shards 0"}
    assert {child["state_type"] for child in children} == {"COMPLETED"}
    assert {child["work_queue_name"] for child in children} == {"gpu"}
    assert devices(workplace, children) == {"0", "1", "2"}
    assert stored(roots / "shared") == undisturbed
    assert workplace.slots_held() == 0


def test_the_group_of_a_killed_worker_is_taken_by_another_and_no_byte_differs(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: list[str], undisturbed: dict[str, bytes]
) -> None:
    run = begin(workplace, config, roots, "killed")
    written = (roots / "killed" / "functaset.zarr").glob
    eventually(lambda: list(written("fragments/*/receipts/*")), RUN_SECONDS, "the first shard is written")
    process = eventually(lambda: stopped_at_work(workplace, roots / "killed", run, workers), RUN_SECONDS, "a group")
    for each in [process, *process.children(recursive=True)]:
        each.kill()
    assert ends(workplace, run)[0] == "COMPLETED", workplace.ask(f"flow_runs/{run}")["state"]["message"]
    assert stored(roots / "killed") == undisturbed
    states = [child["state_type"] for child in groups(workplace, run)]
    assert set(states) == {"COMPLETED", "CRASHED"}


def stopped_at_work(workplace: Cluster, root: Path, run: str, workers: list[str]) -> psutil.Process | None:
    """Stop the process of a group that is being encoded, and return its worker; None if there is no such group now."""
    for child in running(workplace, run):
        for device in devices(workplace, [child]):
            worker = psutil.Process(workplace.processes[workers[int(device)]].pid)
            flows = worker.children(recursive=True)
            for flow in flows:
                flow.suspend()
            if not is_written(root, child["name"]):
                return worker
            for flow in flows:
                flow.resume()
    return None


def is_written(root: Path, name: str) -> bool:
    """Return whether the shard of a group, by the group's name, has a receipt."""
    split, number = name.split()[1], int(name.split()[-1])
    plans = (root / "functaset.zarr" / "fragments").glob("*/plan.json")
    (fragment,) = (plan.parent for plan in plans if json.loads(plan.read_text())["split"] == split)
    return bool(list((fragment / "receipts").glob(f"{number:06d}.*")))


def test_cancelling_the_run_that_waits_cancels_its_groups(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: list[str]
) -> None:
    run = begin(workplace, config, roots, "cancelled")
    eventually(
        lambda: [child for child in running(workplace, run) if child["name"].startswith("encode ")],
        RUN_SECONDS, "a group runs",
    )  # fmt: skip
    body = {"state": {"type": "CANCELLING"}}
    workplace.ask(f"flow_runs/{run}/set_state", body)
    assert ends(workplace, run, 180)[0] == "CANCELLED"
    eventually(
        lambda: {child["state_type"] for child in groups(workplace, run)} <= {"COMPLETED", "CANCELLED"},
        180, "its groups end",
    )  # fmt: skip
    eventually(lambda: not workplace.flow_processes(), 60, "no process is left")
    assert workplace.slots_held() == 0


@pytest.mark.attacks
def test_a_group_reads_and_writes_in_allowed_locations_alone_and_names_no_code(
    workplace: Cluster, config: PipelineConfig, workers: list[str], tmp_path: Path
) -> None:
    job = {
        "images": config.images.model_dump(mode="json"), "encode": config.encode.model_dump(mode="json"),
        "field": str(tmp_path / "field"), "field_digest": "d", "functaset": str(tmp_path / "functaset.zarr"),
        "device": "cpu",
    }  # fmt: skip
    with pytest.raises(OSError, match="409"):
        workplace.run("work-group", work={"kind": "os.system", "job": job})
    run = workplace.run("work-group", work={"kind": "plan-encoding", "job": job}, retries=0)
    assert ends(workplace, run)[0] == "FAILED"
    assert "none of the locations that FUNCTA_ALLOWED_ROOTS" in workplace.ask(f"flow_runs/{run}")["state"]["message"]
    assert not list(tmp_path.iterdir())


def test_evaluators_on_the_pool_measure_the_figures_of_one_process(workplace: Cluster, workers: list[str]) -> None:
    trained = workplace.folder / "trained"
    ledger = trained_root(trained, *TINY)
    config, encoded = ledger.config, recorded(ledger, "encode").figures
    change_record(ledger, "encode", figures=encoded | {"images_digest": images_digest(open_images(config.images))})
    figures: dict[str, dict[str, Any]] = {}
    for runner in ("threads", "prefect"):
        root = workplace.folder / f"evaluated-{runner}"
        changed = config.model_copy(update={"dispatch": config.dispatch.model_copy(update={"runner": runner})})
        run = workplace.run("evaluate", root=str(root), from_root=str(trained), config=changed.model_dump(mode="json"))
        state, name = ends(workplace, run)
        if name == "Moved":
            run = workplace.ask(f"flow_runs/{run}")["state"]["message"].split(" as run ")[1].split()[0]
            state, name = ends(workplace, run)
        assert state == "COMPLETED", workplace.ask(f"flow_runs/{run}")["state"]["message"]
        figures[runner] = json.loads((root / "metrics.json").read_text())
    names = {child["name"] for child in groups(workplace, run)}
    assert {"measure reconstruction", "measure classification", "train the pixel classifier"} <= names
    for values in figures.values():
        for volatile in ("seconds_by_stage", "versions"):
            values.pop(volatile, None)
    assert figures["prefect"] == figures["threads"]
