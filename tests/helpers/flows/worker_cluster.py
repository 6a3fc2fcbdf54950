"""Server and workers as separate real processes, so that each can be killed: what `functa up` starts in one."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil
from filelock import FileLock

from functa.flows.server.api import GPU_LIMIT, HOST, MANNERS, PASSWORD, SERVER_PASSWORD, healthy
from functa.flows.server.local_workers import PYTHON, Worker
from tests.helpers.flows.prefect_server import PROJECT, Served, clean_environment, eventually, free_port

START_SECONDS = 300


@dataclass
class Cluster:
    """A Prefect server and workers of two devices that are there by name alone."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"http://{HOST}:{self.port}/api"

    def environment(self) -> dict[str, str]:
        """Return the environment of every process: no setting of this machine's Prefect, one thread.

        Temporary files are its own, and so are the locks of its devices: other clusters have devices of these names.
        """
        own = {
            "PREFECT_API_URL": self.api, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary()), PASSWORD: self.password(), SERVER_PASSWORD: self.password(),
        }  # fmt: skip
        return clean_environment(self.folder / "home") | MANNERS | self.settings | own

    def password(self) -> str:
        """Return the password, which is kept where `functa up` keeps it."""
        file = self.folder / "home" / "functa" / f"password-{self.port}"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"functa:{token_hex()}")
        return file.read_text()

    def temporary(self) -> Path:
        folder = self.folder / "tmp"
        folder.mkdir(exist_ok=True)
        return folder

    @contextlib.contextmanager
    def busy(self, *devices: str) -> Iterator[None]:
        """Hold these devices, like the runs of another server here: whatever a worker begins on them waits."""
        locks = self.temporary() / f"functa-devices-{os.getuid()}"
        locks.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as held:
            for device in devices:
                held.enter_context(FileLock(locks / f"{device}.lock"))
            yield

    def start(self, name: str, command: list[str], **own: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=PROJECT, env=self.environment() | own, stdout=log, stderr=log, start_new_session=True
            )

    def start_server(self) -> None:
        self.start("server", [*PYTHON, "functa.flows.server.guarded", "--port", str(self.port)])
        eventually(lambda: healthy(self.api), START_SECONDS, f"the server answers; {self.log('server')}")

    def start_worker(self, queue: str, device: str | None = None) -> str:
        """Start a worker and return its name, once it polls."""
        number = sum(name.startswith(f"{queue}-") for name in self.processes)
        worker = Worker(f"{queue}-{number}", queue, None if queue == "cpu" else 1, device)
        self.start(worker.name, worker.command(), **worker.environment())
        eventually(lambda: "started!" in self.log(worker.name), START_SECONDS, f"worker {worker.name} starts")
        return worker.name

    def bootstrap(self, *options: str) -> str:
        command = [sys.executable, "-m", "functa.deploy.bootstrap", "--root", str(self.folder / "root"), *options]
        done = subprocess.run(command, cwd=PROJECT, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """Send SIGKILL to this process alone: its children live on."""
        self.processes[name].kill()
        self.processes[name].wait()

    def flow_processes(self) -> list[psutil.Process]:
        """Return the processes of flow runs, by whichever worker."""
        return [p for p in psutil.process_iter() if self._is_ours(p) and "prefect.engine" in " ".join(p.cmdline())]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("PREFECT_API_URL") == self.api and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def served(self) -> Served:
        return Served(next(iter(self.processes.values())), self.port, self.folder / "home", self.folder / "root")  # type: ignore[arg-type]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.served().ask(path, body)

    def run(self, deployment: str, **parameters: Any) -> str:
        """Start a run of the deployment and return its id."""
        (found,) = (d for d in self.ask("deployments/filter", {}) if d["name"] == deployment)
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> str:
        return str(self.ask(f"flow_runs/{run}")["state_type"])

    def slots_held(self) -> int:
        return int(self.ask(f"v2/concurrency_limits/{GPU_LIMIT}")["active_slots"])

    def stop(self) -> None:
        """Stop every process that was started, with its descendants."""
        for process in [p for p in psutil.process_iter() if self._is_ours(p)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for child in self.processes.values():
            child.wait()


@contextlib.contextmanager
def cluster(folder: Path, gpus: int = 2, **settings: str) -> Iterator[Cluster]:
    """Run a server with deployments and a slot for each device; the test starts the workers."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Cluster(folder, settings)
    try:
        made.start_server()
        made.bootstrap("--gpus", str(gpus))
        yield made
    finally:
        made.stop()
