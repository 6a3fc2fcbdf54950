"""Dask: processes of this machine, one device each, or an operator's cluster.

A unit of work asks for one of a worker's resource GPU, and every worker has one: no device is held twice. A cluster of
our own speaks over loopback under TLS with a certificate that only it knows: Dask's messages carry pickles, and whoever
may send one runs code here.
"""

import logging
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from functa.storage.errors import one_line
from functa.tasks.config import DispatchConfig
from functa.tasks.dispatch.child import DispatchError, threads_of_a_run

if TYPE_CHECKING:
    from distributed import Client, SpecCluster
    from prefect_dask import DaskTaskRunner


HOST = "127.0.0.1"

RESOURCES = {"GPU": 1}

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Of our own cluster: a worker that looks at its own stack a hundred times a second, and at its clock fifty times, takes
# that time from what it computes.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "60s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.gil.enabled": False,
}

CONNECT_SECONDS = 20

WORKER_SECONDS = 90  # until a first worker is there


@contextmanager
def dask_runner(
    dispatch: DispatchConfig, ended: Callable[[], None] = lambda: None
) -> "Iterator[tuple[DaskTaskRunner, Callable[[], None]]]":
    """A started task runner whose submissions ask for a GPU worker, and a call that raises when the cluster is lost.

    `ended` is called at the end on every worker of an operator's cluster: ours end themselves.
    Raises DispatchError: no scheduler answers, no worker has the resource, two of them share a device; later that the
    cluster was lost, or that one unit of work killed worker after worker.
    """
    import dask
    from distributed import CancelledError, Client, KilledWorker
    from prefect_dask import DaskTaskRunner

    with _cluster(dispatch) as address:
        try:
            probe = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except TypeError:
            raise DispatchError(
                f"dispatch.address={dispatch.address}: needs certificates; name them in Dask's configuration "
                "(distributed.comm.tls: ca-file, client.cert, client.key)"
            ) from None
        except (OSError, ValueError) as error:
            raise DispatchError(
                f"dispatch.address={dispatch.address}: no Dask scheduler answers ({one_line(error)}); start one with "
                "`dask scheduler`, or leave the address empty for processes of this machine"
            ) from None
        with probe:
            _check_workers(probe, dispatch)
        client = {"timeout": CONNECT_SECONDS}
        given: dict[str, Any] = {"address": address} if isinstance(address, str) else {"cluster": address}
        runner = DaskTaskRunner(**given, client_kwargs=client)
        with runner, dask.annotate(resources=RESOURCES):
            try:
                yield runner, _watch(runner.client, dispatch)
            except CancelledError:  # before the loss itself was seen
                raise _lost(dispatch) from None
            except KilledWorker as error:
                raise DispatchError(
                    f"Dask cluster {_where(dispatch)}: {error.allowed_failures + 1} workers died one after the other "
                    "of the same work (out of memory?); a smaller batch needs less"
                ) from None
            finally:
                if dispatch.address and runner.client.status == "running":
                    with suppress(Exception):  # a courtesy, which says nothing of the work
                        runner.client.run(ended)


@contextmanager
def _cluster(dispatch: DispatchConfig) -> "Iterator[str | SpecCluster]":
    if dispatch.address:
        yield dispatch.address
        return
    import dask
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.security import Security
    from prefect.settings import PREFECT_API_URL

    # They tell of every connection, of each that is not there when workers are ended at work, and of no dashboard.
    for name, level in (("distributed", logging.CRITICAL), ("prefect.task_runner.dask", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    own = environments(dispatch.workers)
    security = Security.temporary()
    nanny = {"nthreads": 1, "host": HOST, "resources": RESOURCES, "memory_limit": 0, "dashboard": False}
    nanny |= {"security": security, "protocol": "tls://", "silence_logs": logging.CRITICAL}
    workers = {number: {"cls": Nanny, "options": nanny | {"env": each}} for number, each in enumerate(own)}
    scheduler = {
        "host": HOST,
        "port": 0,
        "dashboard": False,
        "dashboard_address": f"{HOST}:0",
        "security": security,
        "protocol": "tls://",
    }
    # Not every thread of a worker takes Prefect's settings from the run: each would start a server of its own.
    told = {"PREFECT_API_URL": PREFECT_API_URL.value() or "", "DASK_LOGGING__DISTRIBUTED": "critical"}
    told |= {name: own[0][name] for name in THREADS}
    no_pages = {f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker")}  # plain HTTP, for anyone
    with (
        _environment(told),
        dask.config.set(QUIET | no_pages),
        _begun_deaf(
            lambda: SpecCluster(workers, scheduler={"cls": Scheduler, "options": scheduler}, security=security)
        ) as cluster,
    ):
        yield cluster


def _begun_deaf(begin: "Callable[[], SpecCluster]") -> "SpecCluster":
    """Begun in a thread that is deaf to SIGINT, as are all threads and processes that it starts.

    Of a Ctrl-C, which a terminal sends to all of them, this process alone is to hear; it ends the others.
    """
    resource_tracker.ensure_running()  # or a first process would start it, and hear again afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return begin()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(told: Mapping[str, str]) -> Iterator[None]:
    """Adds to this process's environment, which is afterwards what it was.

    A worker's torch may be loaded before its nanny gives it an environment of its own, so that it must inherit its
    number of threads; and a nanny leaves words of its own in this one (a single thread), which trainings would heed.
    """
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield
    finally:
        os.environ.update(before)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


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
    return [
        dict.fromkeys(THREADS, threads) | ({"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {})
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
    where = _where(dispatch)
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
    except Exception as error:  # what a worker could not even unpickle comes as a plain Exception
        raise DispatchError(
            f"Dask cluster {where}: a worker cannot run this project ({one_line(error)}): install it there"
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
    """What raises DispatchError once the scheduler is lost: whatever it was asked for has gone with it."""

    def check() -> None:
        if client.status != "running":
            raise _lost(dispatch)

    return check


def _lost(dispatch: DispatchConfig) -> DispatchError:
    return DispatchError(
        f"lost the Dask scheduler {_where(dispatch)}; what was written stands, the same command continues"
    )


def _where(dispatch: DispatchConfig) -> str:
    return dispatch.address or "of this machine"


def given_up() -> bool:
    """On a worker, in the thread of a unit of work: whether nobody waits for it any more."""
    from distributed import Status, get_worker

    try:
        worker = get_worker()
        key = worker.get_current_task()
    except ValueError:  # no worker's thread
        return False
    task = worker.state.tasks.get(key)
    return task is None or task.state == "cancelled" or worker.status in (Status.closing, Status.closed, Status.failed)
