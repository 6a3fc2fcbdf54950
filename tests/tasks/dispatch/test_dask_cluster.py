"""Dask clusters, our own and an operator's: each fault is reported in one line that names the fix."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from distributed.security import Security

from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch import dask_cluster
from functa.tasks.dispatch.child import DispatchError
from tests.helpers.flows.prefect_server import free_port
from tests.helpers.tasks.dask_processes import scheduler, worker

API = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
DEVICE = ("--resources", "GPU=1")


def fault(**dispatch: Any) -> str:
    """Return the one line with which a cluster is refused."""
    with pytest.raises(DispatchError) as caught, dask_cluster.dask_runner(DispatchConfig(runner="dask", **dispatch)):
        pass
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 5)
    monkeypatch.setattr(dask_cluster, "WORKER_SECONDS", 1)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with scheduler() as (address, _):
        yield address


def test_an_address_without_a_scheduler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 1)
    nobody = f"tcp://127.0.0.1:{free_port()}"
    line = fault(address=nobody)
    assert line.startswith(f"dispatch.address={nobody}: no Dask scheduler answers (")
    assert line.endswith("start one with `dask scheduler`, or leave the address empty for processes of this machine")


def test_a_tls_address_without_certificates_is_refused() -> None:
    assert "needs certificates; name them in Dask's configuration" in fault(address=f"tls://127.0.0.1:{free_port()}")


def test_a_cluster_whose_workers_have_no_device_is_refused(address: str) -> None:
    expected = "no worker with resource GPU in 1 s; start them with `CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS"
    assert expected in fault(address=address)
    with worker(address, **API):
        assert expected in fault(address=address)


def test_a_worker_that_cannot_import_the_project_is_refused(address: str) -> None:
    with worker(address, *DEVICE, before="import sys; sys.modules['functa'] = None", **API):
        assert "a worker cannot run this project (" in (line := fault(address=address))
        assert line.endswith("): install it there")


def test_a_worker_without_a_server_is_refused(address: str) -> None:
    with worker(address, *DEVICE, before="import os; os.environ.pop('PREFECT_API_URL', None)"):
        assert "has no PREFECT_API_URL: start it with this server's" in fault(address=address)


def gpus(*uuids: str) -> str:
    """Return code by which a worker sees these GPUs."""
    stub = "functa.tasks.dispatch.dask_cluster"
    return f"import {stub}; {stub}._sees_gpus = lambda: {len(uuids)}; {stub}._uuids = lambda: {list(uuids)}"


def test_two_workers_that_see_the_same_device_are_refused(address: str) -> None:
    first = worker(address, *DEVICE, before=gpus("GPU-a", "GPU-b"), CUDA_VISIBLE_DEVICES="0,1", **API)
    second = worker(address, *DEVICE, before=gpus("GPU-b"), CUDA_VISIBLE_DEVICES="1", **API)
    with first, second:
        assert "2 workers on " in (line := fault(address=address))
        assert line.endswith("see GPU-b: start each with a CUDA_VISIBLE_DEVICES of its own")


def test_workers_that_each_see_a_device_of_their_own_as_0_are_accepted(address: str) -> None:
    """Slurm's device cgroups show every job its own GPU as 0."""
    dispatch = DispatchConfig(runner="dask", address=address)
    jobs = [worker(address, *DEVICE, before=gpus(each), CUDA_VISIBLE_DEVICES="0", **API) for each in ("GPU-a", "GPU-b")]
    with jobs[0], jobs[1], dask_cluster.dask_runner(dispatch) as (_, check):
        check()


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "_sees_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert fault(workers=3) == "dispatch.workers=3, but this process sees 2 GPUs (one for each): lower it"
    assert [each["CUDA_VISIBLE_DEVICES"] for each in dask_cluster.environments(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, MIG-b")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in dask_cluster.environments(2)] == ["GPU-a", "MIG-b"]


def test_workers_share_the_threads_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert {each["OMP_NUM_THREADS"] for each in dask_cluster.environments(3)} == {"2"}
    assert {each["OMP_NUM_THREADS"] for each in dask_cluster.environments(9)} == {"1"}


def test_our_own_cluster_listens_on_loopback_and_accepts_only_its_certificate() -> None:
    before = dict(os.environ)
    with dask_cluster._cluster(DispatchConfig(runner="dask", workers=1)) as ours:
        assert not isinstance(ours, str)
        at = ours.scheduler_address
        assert at.startswith("tls://127.0.0.1:")
        with pytest.raises(OSError):
            Client(at, security=Security.temporary(), timeout=3, set_as_default=False)
        with pytest.raises(OSError):
            Client(at.replace("tls", "tcp"), timeout=3, set_as_default=False)
    assert {**os.environ, "__DASK_PARENT_PID": ""} == {**before, "__DASK_PARENT_PID": ""}
