"""Run work on Dask: processes of this machine, one device each, or an operator's cluster.

A unit of work requests one of a worker's resource GPU, and every worker has one, so no device is used twice at once.
Our own cluster communicates over loopback under TLS, with a certificate that only it knows: Dask's messages carry
pickles, so whoever can send one can run code here.
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
    from prefect_dask.task_runners import DaskTaskRunner


HOST = "127.0.0.1"

RESOURCES = {"GPU": 1}

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# For our own cluster: by default a worker samples its stack 100 times a second and its clock 50 times, which costs
# computing time.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "60s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.gil.enabled": False,
}

CONNECT_SECONDS = 20

WORKER_SECONDS = 90  # to wait for a first worker


@contextmanager
def dask_runner(
    dispatch: DispatchConfig, ended: Callable[[], None] = lambda: None
) -> "Iterator[tuple[DaskTaskRunner, Callable[[], None]]]":
    """Start a task runner whose submissions request a GPU worker; yield it, and a check that the cluster still runs.

    `ended` is called at the end on every worker of an operator's cluster; our own workers end themselves.
    Raises DispatchError if no scheduler answers, no worker has the resource, or two share a device; later if the
    connection to the cluster is lost, or one unit of work kills worker after worker.
    """
    from dask.base import annotate
    from distributed import CancelledError, Client, KilledWorker
    from prefect_dask.task_runners import DaskTaskRunner

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
        with runner, annotate(resources=RESOURCES):
            try:
                yield runner, _watch(runner.client, dispatch)
            except CancelledError:  # the check had not seen the loss yet
                raise _lost(dispatch) from None
            except KilledWorker as error:
                raise DispatchError(
                    f"Dask cluster {_where(dispatch)}: {error.allowed_failures + 1} workers died one after the other "
                    "on the same work (out of memory?); set a smaller batch"
                ) from None
            finally:
                if dispatch.address and runner.client.status == "running":
                    with suppress(Exception):  # optional: a failure here does not concern the work
                        runner.client.run(ended)


@contextmanager
def _cluster(dispatch: DispatchConfig) -> "Iterator[str | SpecCluster]":
    if dispatch.address:
        yield dispatch.address
        return
    import dask
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.security import Security
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

    # They log every connection, every broken one when busy workers are ended, and the missing dashboard.
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
    # Not every thread of a worker gets Prefect's settings from the run: without them each would start a server.
    environment = {"PREFECT_API_URL": PREFECT_API_URL.value() or "", "DASK_LOGGING__DISTRIBUTED": "critical"}
    if password := PREFECT_API_AUTH_STRING.value():
        environment["PREFECT_API_AUTH_STRING"] = password
    environment |= {name: own[0][name] for name in THREADS}
    # Pages would be plain HTTP, for anyone.
    no_pages: dict[str, list[str]] = {f"distributed.{part}.http.routes": [] for part in ("scheduler", "worker")}
    with (
        _environment(environment),
        dask.config.set(QUIET | no_pages),
        _ignoring_interrupts(
            lambda: SpecCluster(workers, scheduler={"cls": Scheduler, "options": scheduler}, security=security)
        ) as cluster,
    ):
        yield cluster


def _ignoring_interrupts(begin: "Callable[[], SpecCluster]") -> "SpecCluster":
    """Start the cluster with SIGINT blocked in this thread, and so in all threads and processes that it starts.

    A terminal sends Ctrl-C to all of them; only this process handles it, and ends the others.
    """
    resource_tracker.ensure_running()  # else the first process would start it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return begin()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Add variables to this process's environment, and restore it afterwards.

    A worker may load torch before its nanny sets the worker's environment, so it must inherit its number of threads.
    A nanny also sets variables here (a single thread), which trainings would obey.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.update(before)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def environments(workers: int) -> list[dict[str, str]]:
    """Return the environment of each worker process of this machine: its device and its share of the threads.

    Raises DispatchError if there are GPUs, but fewer than workers.
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


def device_identities() -> list[str]:
    """Return what this process's GPUs are, whatever they are called here: their UUIDs, which no two GPUs share.

    Where each job sees its own GPU as 0, as under Slurm's device cgroups, several GPUs have one name. A name of the
    form MIG-... is an identity by itself, and so is every name where there is no GPU.
    """
    names = visible_devices()
    if not _sees_gpus() or all(name.startswith("MIG-") for name in names):
        return names
    return _uuids()


def _uuids() -> list[str]:
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(torch.cuda.device_count())]


def visible_devices() -> list[str]:
    """Return the names of this process's GPUs, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(_sees_gpus())]


def _sees_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _check_workers(client: "Client", dispatch: DispatchConfig) -> None:
    """Check that there is a worker with the resource, that each can import the project, and no two share a GPU."""
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
    except Exception as error:  # a worker that cannot unpickle the call answers with a plain Exception
        raise DispatchError(
            f"Dask cluster {where}: a worker cannot run this project ({one_line(error)}): install it there"
        ) from None
    if without := sorted(address for address, each in described.items() if not each["api"]):
        raise DispatchError(
            f"Dask cluster {where}: worker {without[0]} has no PREFECT_API_URL: start it with this server's, or it "
            "would start one of its own"
        )
    held = Counter(device for each in described.values() for device in each["devices"])
    for device, count in held.items():
        if count > 1:
            hosts = {each["host"] for each in described.values() if device in each["devices"]}
            raise DispatchError(
                f"Dask cluster {where}: {count} workers on {', '.join(sorted(hosts))} see {device}: start each with a "
                "CUDA_VISIBLE_DEVICES of its own"
            )


def _able_workers(client: "Client") -> list[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [address for address, worker in workers.items() if worker["resources"].get("GPU", 0) >= 1]


def describe_worker() -> dict[str, Any]:
    """Return a worker's host, the UUIDs of its GPUs, and its Prefect server. Runs on the worker."""
    return {
        "host": platform.node(),
        "devices": device_identities() if _sees_gpus() else [],
        "api": os.environ.get("PREFECT_API_URL", ""),
    }


def _watch(client: "Client", dispatch: DispatchConfig) -> Callable[[], None]:
    """Return a check that raises DispatchError once the scheduler is lost, and all submitted work with it."""

    def check() -> None:
        if client.status != "running":
            raise _lost(dispatch)

    return check


def _lost(dispatch: DispatchConfig) -> DispatchError:
    return DispatchError(
        f"lost the Dask scheduler {_where(dispatch)}; written results are kept, and the same command continues"
    )


def _where(dispatch: DispatchConfig) -> str:
    return dispatch.address or "of this machine"


def run_ended() -> bool:
    """Return whether the current unit of work was cancelled or its worker is closing. Runs on a worker."""
    from distributed import Status, get_worker

    try:
        worker = get_worker()
        key = worker.get_current_task()
    except ValueError:  # not in a worker's thread
        return False
    task = worker.state.tasks.get(key)
    return task is None or task.state == "cancelled" or worker.status in (Status.closing, Status.closed, Status.failed)
