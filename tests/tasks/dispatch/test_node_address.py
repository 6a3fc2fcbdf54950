"""The address at which machines of a pool meet: chosen by the first one, found by the others."""

import json
import platform
import socket
from pathlib import Path
from typing import Any

import pytest

from functa.models.config import FieldConfig, InnerConfig
from functa.storage.config import ImagesConfig
from functa.storage.places.address import open_location
from functa.tasks.config import MetaTrainConfig
from functa.tasks.dispatch import node_address
from functa.tasks.dispatch.child import DispatchError
from functa.tasks.dispatch.node_address import address_key, agreed_address, forget_address, own_address
from functa.tasks.training_jobs import MetaTrainJob, TrainingJob

MEETING = "0" * 32


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a server of this machine, and no interface."""
    monkeypatch.setattr(node_address, "_towards_server", lambda: "127.0.0.1")
    for name in node_address.NAMED:
        monkeypatch.delenv(name, raising=False)


def job_of(folder: Path, node: int) -> TrainingJob:
    sections: dict[str, Any] = {"images": ImagesConfig(), "field": FieldConfig(), "inner": InnerConfig()}
    return MetaTrainJob(
        seed=0,
        device="cpu",
        nodes=2,
        node=node,
        output=str(folder),
        digest="d",
        meta_train=MetaTrainConfig(),
        **sections,
    )


def test_the_others_find_the_address_that_the_first_machine_has_chosen(tmp_path: Path) -> None:
    chosen = agreed_address(job_of(tmp_path, 0), MEETING)
    host, _, port = chosen.partition(":")
    with socket.socket() as listener:
        listener.bind((host, int(port)))
    assert agreed_address(job_of(tmp_path, 1), MEETING) == chosen
    for _ in range(2):
        forget_address(str(tmp_path), MEETING)
        assert not open_location(str(tmp_path)).list()


def test_a_first_machine_that_does_not_begin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_address, "WAIT_SECONDS", 0.0)
    with pytest.raises(DispatchError, match=f"{tmp_path}: node 0 has not begun there within 0 s"):
        agreed_address(job_of(tmp_path, 1), MEETING)


def test_an_address_that_only_its_own_machine_reaches_is_refused_elsewhere(tmp_path: Path) -> None:
    location = open_location(str(tmp_path))
    for address in ("127.0.0.1:29500", "[::1]:29500"):
        location.write(address_key(MEETING), json.dumps({"machine": "other", "address": address}).encode())
        with pytest.raises(DispatchError, match=r"node 0 on other can be reached by itself alone.*NCCL_SOCKET_IFNAME"):
            agreed_address(job_of(tmp_path, 1), MEETING)
    here = {"machine": platform.node(), "address": "127.0.0.1:29500"}
    location.write(address_key(MEETING), json.dumps(here).encode())
    assert agreed_address(job_of(tmp_path, 1), MEETING) == "127.0.0.1:29500"


def test_the_interface_that_the_environment_names_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_address, "_towards_server", lambda: "127.0.0.2")
    assert own_address().startswith("127.0.0.2:")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert own_address().startswith("127.0.0.1:")
