"""One training on several workers of a pool: `dispatch.runner=prefect` with `dispatch.nodes`, on real processes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from functa.flows.config.load import load_config
from functa.flows.config.schema import PipelineConfig
from functa.flows.jobs import meta_train_job
from functa.flows.ledger import Ledger
from functa.storage.places.address import open_location
from functa.storage.places.allowed import ALLOWED_ROOTS
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.dispatch.child import train_in_child
from tests.helpers.flows.pool_runs import begin, children, devices, ends, lines, message
from tests.helpers.flows.prefect_server import eventually
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.flows.worker_cluster import Cluster, cluster

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]

SLOTS = 3  # one more than nodes: that of a killed node is free after a minute only
STEPS = [
    *TINY, "inner.compile=off", "field.width=32", "meta_train.steps=200", "meta_train.batch=4",
    "meta_train.validation_images=0", "meta_train.log_every=1", "meta_train.checkpoint_seconds=0.01",
]  # fmt: skip


def config_of(nodes: int) -> PipelineConfig:
    return load_config("digits", [*STEPS, "dispatch.runner=prefect", f"dispatch.nodes={nodes}"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, SLOTS, **{ALLOWED_ROOTS: str(folder)}) as running:
        running.start_worker("cpu")
        yield running


@pytest.fixture(scope="module")
def workers(workplace: Cluster) -> list[str]:
    return [workplace.start_worker("gpu", str(device)) for device in range(2)]


def trained(root: Path) -> dict[str, np.ndarray]:
    checkpoint = load_checkpoint(open_location(str(root / "checkpoints" / "field")))
    assert checkpoint is not None
    assert checkpoint.step == 200
    return checkpoint.tensors


@pytest.fixture(scope="module")
def together(workplace: Cluster, workers: list[str]) -> dict[str, np.ndarray]:
    """Train on two workers; return the tensors."""
    run = begin(workplace, "meta-train", config_of(2), root=str(workplace.folder / "together"))
    assert ends(workplace, run)[0] == "COMPLETED", message(workplace, run)
    found = children(workplace, run)
    assert sorted(child["name"] for child in found) == ["train the field on node 0", "train the field on node 1"]
    assert {child["state_type"] for child in found} == {"COMPLETED"}
    assert {child["work_queue_name"] for child in found} == {"gpu"}
    assert devices(workplace, found) == {"0", "1"}
    assert workplace.slots_held() == 0
    left = open_location(str(workplace.folder / "together" / "checkpoints" / "field")).list()
    assert not [key for key in left if key.startswith("address-")]
    return trained(workplace.folder / "together")


def test_two_workers_train_what_one_machine_trains(
    together: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    ledger = Ledger(load_config("digits", [*STEPS, "dispatch.devices=2"]), str(tmp_path))
    with ledger.working("meta_train") as record:
        train_in_child(meta_train_job(ledger, record), lambda row: None)
    one = trained(tmp_path)
    for name, value in together.items():
        np.testing.assert_allclose(value, one[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_node_that_dies_fails_the_training_and_the_rerun_continues_bit_for_bit(
    workplace: Cluster, workers: list[str], together: dict[str, np.ndarray]
) -> None:
    root = workplace.folder / "killed"
    run = begin(workplace, "meta-train", config_of(2), root=str(root))
    (device,) = eventually(lambda: devices_of(workplace, run, "node 1"), 300, "the device of node 1 is logged")
    machine = psutil.Process(workplace.processes[workers[int(device)]].pid)
    eventually(lambda: list((root / "checkpoints" / "field").glob("step-*.json")), 300, "the first checkpoint")
    for process in [*machine.children(recursive=True), machine]:
        process.kill()
    assert ends(workplace, run)[0] == "FAILED"
    fault = message(workplace, run)
    assert "train the field on node 0: " in fault
    assert "lost the other training processes" in fault
    assert "start the training on all of them again, which continues at the newest checkpoint" in fault
    assert "\n" not in fault
    workplace.start_worker("gpu", device)
    again = begin(workplace, "meta-train", config_of(2), root=str(root))
    assert ends(workplace, again)[0] == "COMPLETED", message(workplace, again)
    eventually(
        lambda: [line for line in lines(workplace, children(workplace, again)) if "resumed at step" in line],
        60, "the log names the step",
    )  # fmt: skip
    for name, value in trained(root).items():
        np.testing.assert_array_equal(value, together[name], err_msg=name)


def devices_of(workplace: Cluster, run: str, node: str) -> set[str]:
    chosen = [child for child in children(workplace, run) if child["name"].endswith(node)]
    return devices(workplace, chosen) if chosen else set()


def test_more_nodes_than_the_pool_can_run_at_once_are_refused_in_one_line(workplace: Cluster) -> None:
    run = begin(workplace, "meta-train", config_of(SLOTS + 1), root=str(workplace.folder / "refused"))
    assert ends(workplace, run)[0] == "FAILED"
    assert "dispatch.nodes=4: limit 'functa-gpu' lets 3 runs compute at the same time: start a worker and add a" in (
        message(workplace, run)
    )
    assert not children(workplace, run)
