"""Several machines that train together: the weights of one machine, and one line for whatever goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from functa.flows.config.load import load_config
from functa.storage.errors import FunctaError, StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import PROJECT, train_in_child
from functa.tasks.training import meeting
from functa.tasks.training.meeting import interface_to, meet, split_address
from functa.tasks.training_jobs import ClassifierJob, TrainingJob, this_node
from tests.helpers.storage.functasets import filled


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def job_of(folder: Path, output: str, node: int = 0, steps: int = 6, **options: Any) -> TrainingJob:
    if not (folder / "z").exists():
        filled(folder / "z")
    sets = [f"classifier.steps={steps}", "classifier.warmup=0", "classifier.batch=8", "classifier.model.dropout=0",
            "classifier.log_every=1", "classifier.checkpoint_seconds=0.01"]  # fmt: skip
    config = load_config("digits", sets)
    given: dict[str, Any] = {"devices": 1, "nodes": 2, "node": node} | options
    return ClassifierJob(
        seed=0, device="cpu", digest="d", classifier=config.classifier, functaset=str(folder / "z"), classes=10,
        output=str(folder / output), **given,
    )  # fmt: skip


def free_address(host: str = "127.0.0.2") -> str:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


class Machine:
    """A node's training process, which ends with the test."""

    def __init__(self, job: TrainingJob, inside: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-P", "-m", "functa.tasks.training"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(PROJECT)}, text=True,
        )  # fmt: skip
        assert self.process.stdin
        self.process.stdin.write(job.model_dump_json() + "\n")
        self.process.stdin.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout
        return map(json.loads, self.process.stdout)

    def end(self) -> dict[str, Any]:
        """Return the last row."""
        *_, last = self.rows()
        self.process.wait()
        return dict(last)

    def until_step(self, step: int) -> None:
        next(row for row in self.rows() if row.get("step", 0) >= step)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    started: list[Machine] = []
    yield started
    for machine in started:
        machine.process.kill()
        machine.process.wait()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = load_checkpoint(open_location(str(folder)))
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.mark.slow
@pytest.mark.faults
def test_two_machines_train_what_one_trains_and_continue_bit_for_bit_after_one_has_died(
    tmp_path: Path, machines: list[Machine]
) -> None:
    train_in_child(job_of(tmp_path, "one", nodes=1, devices=2, steps=300), lambda _: None)
    address = free_address()
    machines += [Machine(job_of(tmp_path, "two", node, steps=300, rendezvous=address)) for node in range(2)]
    machines[0].until_step(3)
    machines[1].process.send_signal(signal.SIGKILL)
    last = machines[0].end()
    assert last["error"].startswith("node 0 of 2: lost the other training processes: ")
    assert last["error"].endswith("start the training on all of them again, which continues at the newest checkpoint")
    assert last["may_pass"]
    assert 3 <= load_checkpoint(open_location(str(tmp_path / "two"))).step < 300  # type: ignore[union-attr]
    again = [Machine(job_of(tmp_path, "two", node, steps=300, rendezvous=address)) for node in range(2)]
    machines += again
    rows = [list(each.rows()) for each in again]
    assert any("resumed at step" in row.get("note", "") for row in rows[0])
    assert rows[0][-1]["done"].keys() >= {"weights_digest", "top1_last"}
    assert rows[1][-1] == {"done": {}}
    assert not [row for row in rows[1] if "step" in row]  # only the first machine reports
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert not [key for key in open_location(str(tmp_path / "two")).list() if key.startswith(meeting.OBJECT)]


@pytest.fixture
def namespaces() -> Iterator[dict[str, list[str]]]:
    """Two network namespaces that are joined by a cable: address -> command that runs another one inside."""
    names = {f"10.231.7.{number}": f"functa-{os.getpid()}-{number}" for number in (1, 2)}
    ip = lambda *arguments: subprocess.run(["ip", *arguments], check=True, capture_output=True)  # noqa: E731
    try:
        for name in names.values():
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need the right to make them")
    try:
        one, two = names.values()
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for address, name in names.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield {address: ["ip", "netns", "exec", name] for address, name in names.items()}
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_machines_of_separate_networks_use_the_interface_between_them(
    tmp_path: Path, machines: list[Machine], namespaces: dict[str, list[str]]
) -> None:
    (host, first), (_, second) = namespaces.items()
    for node, inside in enumerate((first, second)):
        machines.append(Machine(job_of(tmp_path, "two", node, rendezvous=f"{host}:29500"), inside))
    assert [machine.end() for machine in machines][1] == {"done": {}}
    assert len(tensors(tmp_path / "two")) > 3


def meet_all(jobs: list[TrainingJob]) -> list[str]:
    """Return what each machine's meeting ended with, "" where it found the others."""

    def of(job: TrainingJob) -> tuple[str, Any]:
        try:
            return "", meet(job, 0)
        except FunctaError as error:
            return str(error), None

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [text for text, _ in list(pool.map(of, jobs))]


@pytest.mark.faults
def test_machines_that_do_not_share_the_root_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SEEN_SECONDS", 0.5)
    address = free_address()
    ended = meet_all([job_of(tmp_path, name, node, rendezvous=address) for node, name in enumerate(("here", "there"))])
    expected = f"{tmp_path}/here: node 1 of 2 does not see what node 0 writes there: use a root that all of them share"
    assert ended == [expected, expected]
    assert meet_all([job_of(tmp_path, "here", node, rendezvous=address) for node in range(2)]) == ["", ""]


def test_machines_that_train_something_else_are_refused(tmp_path: Path) -> None:
    address = free_address()
    jobs = [job_of(tmp_path, "here", node, rendezvous=address) for node in range(2)]
    ended = meet_all([jobs[0], jobs[1].model_copy(update={"digest": "e"})])
    assert ended[0].startswith("node 1 of 2 trains something else: start the same command on all of them")
    assert ended[1] == ended[0]


@pytest.mark.faults
def test_a_machine_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "WAIT_SECONDS", 1.0)
    address = free_address()
    for node, reason in enumerate(("node 1 did not come", "nothing listens there")):
        (ended,) = meet_all([job_of(tmp_path, "here", node, rendezvous=address)])
        assert ended == (
            f"2 machines were to train together at {address}, but {reason}: start the same command on all of them "
            f"within 1 s"
        )


def test_the_first_machine_listens_on_the_given_address_only(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"dispatch.rendezvous=192\.0\.2\.1:29500: the first machine cannot listen"):
        meet(job_of(tmp_path, "here", rendezvous="192.0.2.1:29500"), 0)
    host, port = split_address(free_address())
    store = meeting._serve(job_of(tmp_path, "here", rendezvous=f"{host}:{port}"))
    with socket.create_connection((host, port), timeout=5), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    del store


def test_addresses_lead_to_interfaces() -> None:
    assert split_address("[::1]:29500") == ("::1", 29500)
    assert interface_to("127.0.0.1:1") == "lo"


def test_the_number_of_a_machine_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    four = DispatchConfig(nodes=4, rendezvous="10.0.0.1:29500")
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert this_node(four) == 0
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert (this_node(four), this_node(DispatchConfig())) == (3, 0)
    assert this_node(DispatchConfig(nodes=4, runner="prefect")) == 0  # the pool numbers its nodes
    monkeypatch.setenv("FUNCTA_NODE", "4")
    with pytest.raises(FunctaError, match=r"FUNCTA_NODE=4: dispatch\.nodes=4 has numbers 0 to 3"):
        this_node(four)
