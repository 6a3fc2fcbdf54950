"""The training processes of several machines find each other: through torch's TCP store on the first one.

The store listens on the one address of `dispatch.rendezvous`, which the operator chose, and nowhere else. Before any
work every rank announces what it is about to train, and looks for an object that the first rank has put into the
output: processes of other runs, and machines that do not share the root, are named in one line. A store of a run that
is ending, of which not every process knows yet that another machine died, is recognised and left.
"""

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from uuid import uuid4

import psutil
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from functa.storage.errors import StorageError, TransientError, one_line
from functa.storage.places.address import open_location
from functa.tasks.dispatch.node_address import address_towards
from functa.tasks.training_jobs import WAIT_SECONDS, TrainingJob

SEEN_SECONDS = 15.0  # for an object of the first machine to be visible on the others

AGAIN_SECONDS = 1.0  # between two looks at a store that belongs to an ending run

OBJECT = "nodes-"  # name of the object in the output, with a number of its own

START = "start"  # what the first rank answers if all is well; anything else is the reason to end


def meet(job: TrainingJob, local: int) -> Store:
    """Return the store of all ranks of the job, once all of them are there and see the same output.

    `local` is this rank's number on its machine. Raises TransientError where a machine does not come, StorageError
    where it trains something else, sees other files, or the address is no address of the first machine.
    """
    rank, world = job.node * job.devices + local, job.nodes * job.devices
    until = time.monotonic() + WAIT_SECONDS
    mine = json.dumps([uuid4().hex, job.digest, job.devices])
    store = _serve(job) if rank == 0 else _find(job, until)
    while store.compare_set(f"rank/{rank}", "", mine).decode() != mine:  # another process was this rank: an old store
        if time.monotonic() > until:
            raise TransientError(_absent(job, [f"another process is node {job.node} there"]))
        del store
        time.sleep(AGAIN_SECONDS)
        store = _find(job, until)
    if rank == 0:
        _welcome(store, job, world, mine)
    else:
        _introduce(store, job, rank)
    return PrefixStore("ranks", store)


def interface_to(rendezvous: str) -> str | None:
    """Return the name of the network interface through which this machine reaches the address, None if unknown."""
    own = address_towards(*split_address(rendezvous))
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return "lo" if own.startswith("127.") else None


def split_address(rendezvous: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [HOST]:PORT."""
    host, _, port = rendezvous.rpartition(":")
    return host.strip("[]"), int(port)


def _serve(job: TrainingJob) -> TCPStore:
    """Open the store on the address of the job and on no other one."""
    assert job.rendezvous is not None
    host, port = split_address(job.rendezvous)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise StorageError(
            f"dispatch.rendezvous={job.rendezvous}: the first machine cannot listen there ({error.strerror or error}); "
            f"name an address of that machine and a free port"
        ) from None
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_SECONDS),
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def _find(job: TrainingJob, until: float) -> TCPStore:
    """Connect to the first machine's store, as soon as it is there."""
    assert job.rendezvous is not None
    host, port = split_address(job.rendezvous)
    while True:
        with suppress(OSError), socket.create_connection((host, port), timeout=5):
            break
        if time.monotonic() > until:
            raise TransientError(_absent(job, ["nothing listens there"]))
        time.sleep(AGAIN_SECONDS)
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2 * WAIT_SECONDS))
    except RuntimeError as error:
        raise TransientError(_absent(job, [one_line(error)])) from None


def _welcome(store: Store, job: TrainingJob, world: int, mine: str) -> None:
    """Wait for all ranks; check that they train the same and see the same files; let all of them start."""
    others = range(1, world)
    with suppress(RuntimeError):  # some did not come in time
        store.wait([f"rank/{rank}" for rank in others], timedelta(seconds=WAIT_SECONDS))
    there = [rank for rank in others if store.check([f"rank/{rank}"])]
    if absent := sorted({rank // job.devices for rank in others if rank not in there}):
        raise TransientError(_refuse(store, _absent(job, [f"node {node} did not come" for node in absent]), there))
    for rank in others:
        if json.loads(store.get(f"rank/{rank}"))[1:] != json.loads(mine)[1:]:
            text = f"node {rank // job.devices} of {job.nodes} trains something else: start the same command on all"
            raise StorageError(_refuse(store, f"{text} of them, with the same config and root", there))
    output, name = open_location(job.output), f"{OBJECT}{uuid4().hex}"
    output.write(name, b"")
    try:
        store.set("object", name)
        unseen = sorted({rank // job.devices for rank in others if store.get(f"seen/{rank}") != b"yes"})
    finally:
        output.delete(name)
    if unseen:
        text = f"{job.output}: node {unseen[0]} of {job.nodes} does not see what node 0 writes there: use a root that"
        raise StorageError(_refuse(store, f"{text} all of them share", there))
    store.set("answer", START)


def _introduce(store: Store, job: TrainingJob, rank: int) -> None:
    """Look for the first rank's object, and wait for its answer."""
    try:
        name, until = store.get("object").decode(), time.monotonic() + SEEN_SECONDS
        if name:
            output = open_location(job.output)
            while not (seen := output.exists(name)) and time.monotonic() < until:
                time.sleep(0.2)
            store.set(f"seen/{rank}", "yes" if seen else "no")
        answer = store.get("answer").decode()
        store.set(f"heard/{rank}", "")
    except RuntimeError as error:
        raise TransientError(_absent(job, [one_line(error)])) from None
    if answer != START:
        raise StorageError(answer)


def _refuse(store: Store, text: str, ranks: Iterable[int]) -> str:
    """Send the reason to the ranks that are there, and wait a little until they have read it; return it."""
    store.set("answer", text)
    store.set("object", "")
    with suppress(RuntimeError):
        store.wait([f"heard/{rank}" for rank in ranks], timedelta(seconds=SEEN_SECONDS))
    return text


def _absent(job: TrainingJob, reasons: list[str]) -> str:
    return (
        f"{job.nodes} machines were to train together at {job.rendezvous}, but {', '.join(reasons)}: start the same "
        f"command on all of them within {WAIT_SECONDS:.0f} s"
    )
