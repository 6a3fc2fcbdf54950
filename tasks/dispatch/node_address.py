"""The address at which machines of a pool meet to train together: the first one's own, passed on through their output.

Nobody knows beforehand which machine of the pool becomes the first. It takes an address of the interface that
GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names on its worker, else the one on the way to Prefect's server.
"""

import json
import os
import platform
import socket
import time
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil

from functa.storage.errors import MissingObject
from functa.storage.places.address import open_location
from functa.tasks.dispatch.child import DispatchError, RunEnded
from functa.tasks.dispatch.fan_out import run_ended
from functa.tasks.training_jobs import WAIT_SECONDS, TrainingJob

LOOK_SECONDS = 0.5  # between looks for the first machine's address

MAX_BYTES = 4096  # of the object that holds it

NAMED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # environment variables


def agreed_address(job: TrainingJob, meeting: str) -> str:
    """Return HOST:PORT at which the nodes of a training meet, chosen by node 0; `meeting` is this training's alone.

    Raises DispatchError where node 0 has not begun in time, or no other machine reaches its address.
    """
    location, key = open_location(job.output), address_key(meeting)
    if not job.node:
        chosen = {"machine": platform.node(), "address": own_address()}
        location.write(key, json.dumps(chosen).encode())
        return chosen["address"]
    until = time.monotonic() + WAIT_SECONDS
    while not location.exists(key):
        if run_ended():
            raise RunEnded(f"node {job.node} was not begun: its training has ended")
        if time.monotonic() > until:
            raise DispatchError(
                f"{job.output}: node 0 has not begun there within {WAIT_SECONDS:.0f} s: every worker may be at work, "
                f"or its root is another one than this machine's; use a root that all workers share"
            )
        time.sleep(LOOK_SECONDS)
    found = json.loads(location.read(key, MAX_BYTES))
    machine, address = str(found["machine"]), str(found["address"])
    if machine != platform.node() and ip_address(address.rpartition(":")[0].strip("[]")).is_loopback:
        raise DispatchError(
            f"node 0 on {machine} can be reached by itself alone, at {address}, as it reaches Prefect's server: set "
            f"{NAMED[1]} (on CPUs {NAMED[0]}) of all workers to the interface between the machines"
        )
    return address


def address_key(meeting: str) -> str:
    """Return the key of the object that holds a meeting's address, in the training's output."""
    return f"address-{meeting}.json"


def forget_address(output: str, meeting: str) -> None:
    """Delete the object that held a meeting's address."""
    with suppress(MissingObject):
        open_location(output).delete(address_key(meeting))


def own_address() -> str:
    """Return HOST:PORT of this machine on the network between the workers, with a port that is free now."""
    host = _named_interface() or _towards_server()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_towards(host: str, port: int) -> str:
    """Return the address that this machine has on the way to another one."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _named_interface() -> str | None:
    """Return an address of the interface that the environment names in full, None where it names none."""
    names = {name.lstrip("=") for variable in NAMED for name in os.environ.get(variable, "").split(",")}
    found = [each for name, addresses in psutil.net_if_addrs().items() if name in names for each in addresses]
    for family in (socket.AF_INET, socket.AF_INET6):
        for each in found:
            if each.family == family and not each.address.startswith("fe80"):
                return each.address.partition("%")[0]
    return None


def _towards_server() -> str:
    from prefect.settings import PREFECT_API_URL

    server = urlsplit(PREFECT_API_URL.value() or "")
    if server.hostname is None:
        raise DispatchError("PREFECT_API_URL: names no server, so this machine's address is not known; set it")
    return address_towards(server.hostname, server.port or 443)
