"""A stage that trains on several machines: the first one keeps the records, the others take part."""

from pathlib import Path
from typing import Any

import pytest

from functa.flows import stage_flow
from functa.flows.config.load import load_config
from functa.flows.jobs import meta_train_job
from functa.flows.ledger import Ledger
from functa.flows.stage_flow import check_takes_part, queue_of, taking_part
from functa.storage.errors import FunctaError, StorageError
from functa.storage.runs.stage_records import read_record
from functa.tasks.stage_table import STAGES

TOGETHER = ["dispatch.nodes=2", "dispatch.rendezvous=10.0.0.1:29500", "dispatch.devices=4"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def number(node: int) -> Ledger:
        monkeypatch.setenv("FUNCTA_NODE", str(node))
        return Ledger(load_config("digits", TOGETHER), str(tmp_path))

    return number


def test_other_machines_wait_for_the_first_ones_record_and_leave_it_alone(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_flow, "WAIT_SECONDS", 0.0)
    other = machine(1)
    with pytest.raises(StorageError, match="node 0 has not begun meta-train there"), taking_part(other, "meta_train"):
        pass
    assert read_record(other.location, "meta_train") is None
    first = machine(0)
    with taking_part(first, "meta_train") as record:
        assert meta_train_job(first, record).node == 0
        other = machine(1)
        with taking_part(other, "meta_train") as seen:
            job = meta_train_job(other, seen)
        assert seen == record
        assert (job.node, job.nodes, job.devices, job.rendezvous) == (1, 2, 4, "10.0.0.1:29500")
        assert (job.digest, job.output) == (first.digest("meta_train"), first.output(record))
    assert read_record(other.location, "meta_train") == record


def test_other_machines_do_only_what_trains(machine: Any) -> None:
    ledger = machine(1)
    check_takes_part(ledger, STAGES["train_diffusion"])
    with pytest.raises(StorageError, match="encode: node 0 does it alone; on node 1 run only the stages that train"):
        check_takes_part(ledger, STAGES["encode"])
    check_takes_part(machine(0), STAGES["encode"])


def test_a_training_whose_nodes_are_runs_of_the_pool_waits_for_them_on_queue_cpu() -> None:
    by_pool = load_config("digits", ["dispatch.nodes=2", "dispatch.runner=prefect"])
    assert queue_of(STAGES["train_diffusion"], by_pool) == "cpu"
    one = load_config("digits", ["dispatch.runner=prefect"])
    assert queue_of(STAGES["train_diffusion"], one) == "gpu"
    assert queue_of(STAGES["train_diffusion"], load_config("digits", TOGETHER)) == "gpu"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["dispatch.nodes=2"], "nodes 2 need rendezvous: HOST:PORT of the first machine"),
        ([*TOGETHER, "dispatch.runner=prefect"], "with runner=prefect the pool chooses the first of 2 nodes"),
        ([*TOGETHER, "dispatch.rendezvous=10.0.0.1"], "rendezvous"),
        ([*TOGETHER, "classifier.batch=7"], r"dispatch\.devices=4 on each of dispatch\.nodes=2: choose at least 8"),
    ],
)
def test_what_cannot_train_together_is_refused_before_any_work(sets: list[str], message: str) -> None:
    with pytest.raises(FunctaError, match=message):
        load_config("digits", sets)
