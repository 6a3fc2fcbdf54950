"""A real S3 server: Ceph's object gateway before one monitor and one store in memory, on 127.0.0.1 alone.

with running() as ceph: ceph.environment() is what a client needs; ceph.kill_gateway(), ceph.start_gateway().
"""

import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.storage.ceph_packages import Unavailable, environment, triplet, unpacked

GIB = 1 << 30
STORE_BYTES = GIB  # of memory for objects
PROCESS_BYTES = 4 * GIB  # of address space, for monitor and store each; resident are about 60 MB
START_SECONDS = 90

CONFIG = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
admin socket =
pid file =
log file = {folder}/$name.log
log max recent = 100
mon cluster log file = /dev/null
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd memory target = 939524096
mon osd auto mark in = true
mon data avail warn = 1
mon data avail crit = 1
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
rgw thread pool size = 32
rgw gc obj min wait = 10
rgw gc processor period = 10
"""


@dataclass
class User:
    """S3 credentials."""

    key: str = field(default_factory=lambda: f"AKIA{secrets.token_hex(8).upper()}")
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)


class Ceph:
    """The running server. `user` owns what it makes, `stranger` may do nothing with it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.user, self.stranger = User(), User()
        self.port, self.monitor_port = _free_ports(2)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, user: User | None = None) -> dict[str, str]:
        """Return the AWS_ variables of a client."""
        user = user or self.user
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": user.key,
            "AWS_SECRET_ACCESS_KEY": user.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start monitor, store, users and gateway, which takes about 15 s."""
        fsid = str(uuid.uuid4())
        libraries = self.root / "usr" / "lib" / triplet()
        (self.folder / "ceph.conf").write_text(
            CONFIG.format(
                fsid=fsid,
                monitor_port=self.monitor_port,
                folder=self.folder,
                libraries=libraries,
                store_bytes=STORE_BYTES,
            )
        )
        for below in ("mon", "osd"):
            (self.folder / below).mkdir()
        # The gateway refuses to start without keys, so all have one; the monitor learns them from this ring.
        for i, name in enumerate(("mon.", "client.admin", "osd.0")):
            rights = [word for who in ("mon", "osd", "mgr") for word in ("--cap", who, "allow *")]
            self._run("ceph-authtool", "keyring", *([] if i else ["-C"]), "--gen-key", "-n", name, *rights)
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{self.monitor_port}]", "map")
        # A map for a single store spares the `ceph` command, which is Python and wants packages of its own.
        self._run("osdmaptool", "--createsimple", "1", "osdmap")
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "map", "--osdmap", "osdmap", "--keyring", "keyring")
        self._start("ceph-mon", "-i", "a", limit=PROCESS_BYTES)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", str(uuid.uuid4()))
        self._start("ceph-osd", "-i", "0", limit=PROCESS_BYTES)
        for name, user in (("functa", self.user), ("stranger", self.stranger)):
            self._run(
                "radosgw-admin", "user", "create", "--uid", name, "--display-name", name,
                "--access-key", user.key, "--secret-key", user.secret,
            )  # fmt: skip
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers. It ends with the calling thread, which must outlive it."""
        self._start(
            "radosgw", "-n", "client.admin", "--rgw-frontends", f"beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1"
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_alive()
            with suppress(OSError, urllib.error.URLError):
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5):
                    return
            time.sleep(0.1)
        raise Unavailable(f"radosgw did not answer within {START_SECONDS} s: {self._last_words('radosgw')}")

    def kill_gateway(self) -> None:
        """Kill the gateway with SIGKILL: connections end in the middle of a message."""
        self._kill("radosgw")

    def stop(self) -> None:
        """End every process that was started here, whatever state it is in."""
        for name in list(self.processes):
            self._kill(name)

    def _start(self, program: str, *arguments: str, limit: int | None = None) -> None:
        with open(self.folder / f"{program}.out", "ab") as out:
            # If this process dies without a word, even by SIGKILL, the kernel ends the server, too.
            command = ["setpriv", "--pdeathsig", "KILL", "--"]
            if limit:
                command += ["prlimit", f"--as={limit}", "--"]
            self.processes[program] = subprocess.Popen(
                [*command, str(self._path(program)), "-c", "ceph.conf", *arguments, "-f"],
                cwd=self.folder, env=environment(self.root), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )  # fmt: skip

    def _kill(self, name: str) -> None:
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _run(self, program: str, *arguments: str) -> None:
        self._check_alive()
        configured = ["-c", "ceph.conf"] if program in ("ceph-mon", "ceph-osd", "radosgw-admin") else []
        try:
            done = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", "--", str(self._path(program)), *configured, *arguments],
                cwd=self.folder, env=environment(self.root), capture_output=True, text=True, timeout=START_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{program} did not end within {START_SECONDS} s") from None
        if done.returncode != 0:
            raise Unavailable(f"{program}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")

    def _path(self, program: str) -> Path:
        return self.root / "usr" / "bin" / program

    def _check_alive(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise Unavailable(f"{name} ended with status {process.returncode}: {self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.out").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


@contextmanager
def running() -> Iterator[Ceph]:
    """Run a server with an empty store, deleted at the end. Raises Unavailable in one line."""
    root = unpacked()
    with tempfile.TemporaryDirectory(prefix="functa-ceph-", ignore_cleanup_errors=True) as folder:
        ceph = Ceph(root, Path(folder))
        try:
            ceph.start()
            yield ceph
        finally:
            ceph.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
