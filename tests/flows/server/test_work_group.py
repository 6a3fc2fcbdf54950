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
from functa.flows.server.worker import LEASE_SECONDS
from functa.storage.images.source import open_images
from functa.storage.places.allowed import ALLOWED_ROOTS
from tests.helpers.flows.finished_stages import change_record, recorded
from tests.helpers.flows.pool_runs import begin, children, devices, ends, message, running
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.flows.trained_root import trained_root
from tests.helpers.flows.worker_cluster import Cluster, cluster

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

DEVICES = ("0", "1", "2")
SECONDS = 240  # for whatever a busy machine does in seconds; a killed run is noticed after 90
# Many groups, each of a moment: the tests hold the devices while a group must not end.
OVERRIDES = [
    *TINY, "images.limit=100", "inner.compile=off", "encode.group_shards=1", "encode.shard_rows=16",
    "encode.chunk_rows=16", "encode.quantization.bits=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> PipelineConfig:
    return load_config("digits", OVERRIDES)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, len(DEVICES), **{ALLOWED_ROOTS: str(folder)}) as running:
        running.start_worker("cpu")
        yield running


@pytest.fixture(scope="module")
def workers(workplace: Cluster) -> dict[str, str]:
    """Start a worker for each device; return their names."""
    return {device: workplace.start_worker("gpu", device) for device in DEVICES}


@pytest.fixture(scope="module")
def roots(workplace: Cluster) -> Path:
    """Return the folder of the roots, in which `field` has a trained field."""
    folder = workplace.folder / "roots"
    trained_root(folder / "field", *OVERRIDES, stages=("meta_train",))
    return folder


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


def encode(workplace: Cluster, config: PipelineConfig, roots: Path, name: str) -> str:
    """Begin the encoding of a root on the pool; return the run that waits for its groups."""
    return begin(workplace, "encode", config, root=str(roots / name), from_root=str(roots / "field"))


def planned(workplace: Cluster, run: str) -> bool:
    """Return whether the encoding is planned, so that its groups begin."""
    states = {child["name"]: child["state_type"] for child in children(workplace, run)}
    return states.get("plan encoding") == "COMPLETED"


def all_at_work(workplace: Cluster, run: str) -> bool:
    return len(running(workplace, run)) == len(DEVICES)


@pytest.mark.faults
def test_cancelling_the_run_that_waits_cancels_its_groups(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: dict[str, str]
) -> None:
    run = encode(workplace, config, roots, "cancelled")
    eventually(lambda: planned(workplace, run), SECONDS, "the encoding is planned")
    with workplace.busy(*DEVICES):
        eventually(lambda: all_at_work(workplace, run), SECONDS, "a group on each device")
        workplace.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        assert ends(workplace, run, SECONDS)[0] == "CANCELLED"
        eventually(
            lambda: {child["state_type"] for child in children(workplace, run)} == {"COMPLETED", "CANCELLED"},
            SECONDS, "its groups end",
        )  # fmt: skip
        eventually(lambda: not workplace.flow_processes(), SECONDS, "no process is left")
    eventually(lambda: workplace.slots_held() == 0, LEASE_SECONDS + 60, "their slots are free")


def test_all_workers_share_one_encoding_and_its_groups_are_child_runs(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: dict[str, str], undisturbed: dict[str, bytes]
) -> None:
    run = encode(workplace, config, roots, "shared")
    eventually(lambda: planned(workplace, run), SECONDS, "the encoding is planned")
    with workplace.busy(*DEVICES):  # or the first worker would do everything before the others have started
        eventually(lambda: all_at_work(workplace, run), SECONDS, "a group on each device")
    assert ends(workplace, run)[0] == "COMPLETED", message(workplace, run)
    found = children(workplace, run)
    groups = sum(child["name"].startswith("encode ") for child in found)
    assert groups == len(list((roots / "shared" / "functaset.zarr").glob("fragments/*/receipts/*"))) >= 8
    assert {child["name"] for child in found} >= {"plan encoding", "encode train shards 0"}
    assert {child["state_type"] for child in found} == {"COMPLETED"}
    assert {child["work_queue_name"] for child in found} == {"gpu"}
    assert devices(workplace, found) == set(DEVICES)
    assert stored(roots / "shared") == undisturbed
    assert workplace.slots_held() == 0


@pytest.mark.faults
def test_the_group_of_a_killed_worker_is_taken_by_another_and_no_byte_differs(
    workplace: Cluster, config: PipelineConfig, roots: Path, workers: dict[str, str], undisturbed: dict[str, bytes]
) -> None:
    run = encode(workplace, config, roots, "killed")
    eventually(lambda: planned(workplace, run), SECONDS, "the encoding is planned")
    with workplace.busy(*DEVICES):
        eventually(lambda: all_at_work(workplace, run), SECONDS, "a group on each device")
        worker = psutil.Process(workplace.processes[workers["1"]].pid)
        died = [worker, *worker.children(recursive=True)]
        assert len(died) > 1, "it is at work"
        for process in died:
            process.kill()
        workers["1"] = workplace.start_worker("gpu", "1")
    assert ends(workplace, run)[0] == "COMPLETED", message(workplace, run)
    assert stored(roots / "killed") == undisturbed
    states = [child["state_type"] for child in children(workplace, run)]
    assert states.count("CRASHED") == 1
    assert set(states) == {"COMPLETED", "CRASHED"}


@pytest.mark.attacks
def test_a_group_reads_and_writes_in_allowed_locations_alone_and_names_no_code(
    workplace: Cluster, config: PipelineConfig, workers: dict[str, str], tmp_path: Path
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
    assert "none of the locations that FUNCTA_ALLOWED_ROOTS" in message(workplace, run)
    assert not list(tmp_path.iterdir())


def test_evaluators_on_the_pool_measure_the_figures_of_one_process(workplace: Cluster, workers: dict[str, str]) -> None:
    trained = workplace.folder / "trained"
    ledger = trained_root(trained, *TINY)
    config, encoded = ledger.config, recorded(ledger, "encode").figures
    change_record(ledger, "encode", figures=encoded | {"images_digest": images_digest(open_images(config.images))})
    alone = workplace.run(
        "evaluate", root=str(workplace.folder / "alone"), from_root=str(trained), config=config.model_dump(mode="json")
    )
    shared = begin(workplace, "evaluate", config, root=str(workplace.folder / "evaluated"), from_root=str(trained))
    for run in (alone, shared):
        assert ends(workplace, run)[0] == "COMPLETED", message(workplace, run)
    names = {child["name"] for child in children(workplace, shared)}
    assert {"measure reconstruction", "measure classification", "train the pixel classifier"} <= names
    assert figures(workplace.folder / "evaluated") == figures(workplace.folder / "alone")


def figures(root: Path) -> dict[str, Any]:
    """Return a root's figures, without those that no two runs have in common."""
    found = json.loads((root / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds_by_stage", "versions")}
