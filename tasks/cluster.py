"""Dask: processes of this machine, one device each, or an operator's cluster.

A unit of work asks for one of a worker's resource GPU, and every worker has one: no device is held twice. A cluster of
our own speaks over loopback under TLS with a certificate that only it knows: Dask's messages carry pickles, and whoever
may send one runs code here.
"""

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.config import DispatchConfig
from tasks.dispatch import DispatchError, threads_of_a_run

if TYPE_CHECKING:
    from distributed import Client, SpecCluster
    from prefect_dask import DaskTaskRunner

HOST = "127.0.0.1"
RESOURCES = {"GPU": 1}
CONNECT_SECONDS = 20
WORKER_SECONDS = 90  # until a first worker is there
LOST_SECONDS = 20  # without the scheduler: it would have come back


@contextmanager
def dask_runner(dispatch: DispatchConfig) -> "Iterator[tuple[DaskTaskRunner, Callable[[], None]]]":
    """A started task runner whose submissions ask for a GPU worker, and a call that raises when the cluster is lost.

    Raises DispatchError: no scheduler answers, no worker has the resource, two of them share a device.
    """
    import dask
    from distributed import Client
    from prefect_dask import DaskTaskRunner

    with _cluster(dispatch) as address:
        try:
            probe = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:  # unreachable; a tls:// address without certificates
            raise DispatchError(
                f"dispatch.address={dispatch.address}: no Dask scheduler answers ({_line(error)}); start one with "
                "`dask scheduler`, or leave the address empty for processes of this machine"
            ) from None
        with probe:
            _check_workers(probe, dispatch)
        client = {"timeout": CONNECT_SECONDS}
        given: dict[str, Any] = {"address": address} if isinstance(address, str) else {"cluster": address}
        runner = DaskTaskRunner(**given, client_kwargs=client)
        with runner, dask.annotate(resources=RESOURCES):
            yield runner, _watch(runner.client, dispatch)


@contextmanager
def _cluster(dispatch: DispatchConfig) -> "Iterator[str | SpecCluster]":
    if dispatch.address:
        yield dispatch.address
        return
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.security import Security
    from prefect.settings import PREFECT_API_URL

    logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells of every connection
    security = Security.temporary()
    nanny = {"nthreads": 1, "host": HOST, "resources": RESOURCES, "memory_limit": 0, "dashboard": False}
    nanny |= {"security": security, "protocol": "tls://", "silence_logs": logging.ERROR}
    # Not every thread of a worker takes Prefect's settings from the run: each would start a server of its own.
    told = {"PREFECT_API_URL": PREFECT_API_URL.value() or ""}
    workers = {
        number: {"cls": Nanny, "options": nanny | {"env": environment | told}}
        for number, environment in enumerate(environments(dispatch.workers))
    }
    scheduler = {
        "host": HOST,
        "port": 0,
        "dashboard": False,
        "dashboard_address": f"{HOST}:0",
        "security": security,
        "protocol": "tls://",
    }
    with SpecCluster(workers=workers, scheduler={"cls": Scheduler, "options": scheduler}, security=security) as cluster:
        yield cluster


def environments(workers: int) -> list[dict[str, str]]:
    """What each worker process of this machine has of its own: its device, and its share of the threads.

    Raises DispatchError where there are GPUs, but fewer than workers.
    """
    devices = visible_devices()
    if devices and len(devices) < workers and _sees_gpus():
        raise DispatchError(
            f"dispatch.workers={workers}, but this process sees {len(devices)} GPUs (one for each): lower it"
        )
    threads = str(max(1, threads_of_a_run() // workers))
    shared = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return [
        shared | ({"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {})
        for number in range(workers)
    ]


def visible_devices() -> list[str]:
    """Names of the GPUs of this process, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(_sees_gpus())]


def _sees_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _check_workers(client: "Client", dispatch: DispatchConfig) -> None:
    """There is a worker with the resource, each can import the project, and no two have the same GPU."""
    where = dispatch.address or "of this machine"
    begun = time.monotonic()
    while not (able := _able_workers(client)):
        if time.monotonic() - begun > WORKER_SECONDS:
            raise DispatchError(
                f"Dask cluster {where}: no worker with resource GPU in {WORKER_SECONDS} s; start them with "
                "`CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 1 --resources GPU=1`, one for each device"
            )
        time.sleep(0.5)
    try:
        described = client.run(describe_worker, workers=able)
    except (ImportError, AttributeError) as error:
        raise DispatchError(
            f"Dask cluster {where}: a worker cannot run this project ({_line(error)}): install it there"
        ) from None
    if without := sorted(address for address, each in described.items() if not each["api"]):
        raise DispatchError(
            f"Dask cluster {where}: worker {without[0]} has no PREFECT_API_URL: start it with this server's, or it "
            "would start one of its own"
        )
    held = Counter((each["host"], device) for each in described.values() for device in each["devices"])
    for (host, device), count in held.items():
        if count > 1:
            raise DispatchError(
                f"Dask cluster {where}: {count} workers on {host} see GPU {device}: start each with a "
                "CUDA_VISIBLE_DEVICES of its own"
            )


def _able_workers(client: "Client") -> list[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [address for address, worker in workers.items() if worker["resources"].get("GPU", 0) >= 1]


def describe_worker() -> dict[str, Any]:
    """Runs on a worker: its host, its GPUs if there are any, and the Prefect server that it tells."""
    return {
        "host": platform.node(),
        "devices": visible_devices() if _sees_gpus() else [],
        "api": os.environ.get("PREFECT_API_URL", ""),
    }


def _watch(client: "Client", dispatch: DispatchConfig) -> Callable[[], None]:
    """What raises DispatchError once the scheduler has been away for a while."""
    heard = time.monotonic()

    def check() -> None:
        nonlocal heard
        if client.status == "running":
            heard = time.monotonic()
        elif client.status == "closed" or time.monotonic() - heard > LOST_SECONDS:
            raise DispatchError(
                f"lost the Dask scheduler {dispatch.address or 'of this machine'}; what was written stands, the same "
                "command continues"
            )

    return check


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
