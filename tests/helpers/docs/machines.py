"""Substitutes for the machines of the how-to pages: Slurm's commands, ssh and kubectl, which start the steps here."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.helpers.docs.pages import PROJECT, Block
from tests.helpers.docs.reader import environment_of, furnish, script
from tests.helpers.flows.prefect_server import free_port

PORTS = ("4200", "29500")  # on the pages: of Prefect's server, and where machines that train together meet

SBATCH = """
for task in $(seq 0 "$(sed -n 's/^#SBATCH --array=0-//p' "$1" | grep . || echo 0)" | head -n 2); do
  export SLURM_JOB_ID=$((RANDOM)) SLURM_ARRAY_TASK_ID=$task SLURM_GPUS=2
  setsid bash -c 'bash "$0"; echo $? > "slurm-$0-$SLURM_ARRAY_TASK_ID.status"' "$1" > "slurm-$1-$task.out" 2>&1 &
  echo $! >> jobs
done
"""  # two tasks of an array at most, on two devices that are there by name alone

SRUN = """
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit ${status:-0}
"""

TUNNEL = """
import asyncio
import re
import sys

here, there = re.search(r"-L 127.0.0.1:(\\d+):127.0.0.1:(\\d+)", " ".join(sys.argv)).groups()


async def pump(source, sink):
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
    sink.close()


async def accept(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(there))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)


async def main():
    async with await asyncio.start_server(accept, "127.0.0.1", int(here)) as server:
        await server.serve_forever()


asyncio.run(main())
"""


def furnish_machines(folder: Path) -> None:
    """Furnish a reader's folder, with the commands of a cluster among its own."""
    furnish(folder)
    scripts = folder / ".venv" / "bin"
    (folder / "tunnel.py").write_text(TUNNEL)
    script(scripts / "prefect", f'exec "{sys.executable}" -m prefect "$@"')
    script(scripts / "ssh", f'exec "{sys.executable}" "{folder}/tunnel.py" "$@"')
    script(scripts / "sbatch", SBATCH, shell="bash")
    script(scripts / "srun", SRUN, shell="bash")
    script(scripts / "hostname", "echo 127.0.0.1")
    script(scripts / "kubectl", 'printf "%s\\n" "$*" >> kubectl.log')
    (folder / "deploy").symlink_to(PROJECT / "deploy")


def machine_environment(folder: Path) -> dict[str, str]:
    """Return the reader's environment without the Prefect of other tests: its folder is where the pages name it."""
    kept = {name: value for name, value in environment_of(folder).items() if not name.startswith("PREFECT_")}
    kept.pop("XDG_DATA_HOME", None)
    return kept | {"OMP_NUM_THREADS": "1"}


def on_free_ports(*found: Block) -> list[Block]:
    """Return the blocks with ports that nobody on this machine serves, the same in all of them."""
    ports = {port: str(free_port()) for port in PORTS}

    def moved(text: str) -> str:
        for port, free in ports.items():
            text = text.replace(port, free)
        return text

    return [Block(block.page, block.line, block.language, moved(block.text)) for block in found]


def jobs(folder: Path) -> list[psutil.Process]:
    """Return the processes of jobs that sbatch started and that have not ended."""
    file, found = folder / "jobs", []
    for pid in file.read_text().split() if file.exists() else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def finish_jobs(folder: Path, seconds: float) -> list[str]:
    """Wait for all jobs; return the exit status of each."""
    deadline = time.monotonic() + seconds
    while jobs(folder):
        assert time.monotonic() < deadline, [file.read_text()[-2000:] for file in folder.glob("slurm-*.out")]
        time.sleep(1)
    return [file.read_text().strip() for file in sorted(folder.glob("slurm-*.status"))]


def end_jobs(folder: Path) -> None:
    """End every job that still runs, with its children."""
    for process in jobs(folder):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving_block(block: Block, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a block that serves until Ctrl-C, once it is ready; end it afterwards."""
    environment = environment | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["bash", "-c", f"exec {block.text.strip()}"], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed = []
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if "Ctrl-C" in line:
                break
        assert process.poll() is None, "".join(printed)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=120)
