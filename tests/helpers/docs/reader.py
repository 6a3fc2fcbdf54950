"""A reader's folder: a trained root of the demo, photographs, and the command under the names that the pages use."""

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.docs.pages import PROJECT, Block

PRELUDE = "set -e\nexport PATH=$PWD/.venv/bin:$PATH\n"


def furnish(folder: Path) -> None:
    """Put a checkout's command, the demo's root and a home with photographs into the folder."""
    scripts = folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    script(scripts / "functa", f'exec "{sys.executable}" -m tests.helpers.docs.small_functa "$@"')
    script(scripts / "activate", "true")
    script(scripts / "python", f'exec "{sys.executable}" "$@"')
    with tarfile.open(PROJECT / "tests/fixtures/root-0.1.0.tar.xz") as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (folder / "functa-runs").mkdir()
    (folder / "unpacked/root").rename(folder / "functa-runs/digits")
    _photographs(folder / "home/Pictures", 40)


def script(path: Path, text: str, shell: str = "sh") -> None:
    path.write_text(f"#!/usr/bin/env {shell}\n{text}\n")
    path.chmod(0o755)


def _photographs(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((120, 90), Image.Resampling.BICUBIC).save(folder / f"photo-{number:02}.jpg", quality=90)


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of a reader whose home is in the folder."""
    return {**os.environ, "HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT), "COLUMNS": "200"}


def run_block(block: Block, folder: Path, timeout: float = 1800, environment: dict[str, str] | None = None) -> str:
    """Run a shell or Python block in the folder; return its output. Fails with the block's place and output."""
    command = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-c", PRELUDE + block.text]
    environment = environment_of(folder) if environment is None else environment
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the command's own children too
            raise
    assert process.returncode == 0, f"{block}\n{block.text}\n{output[-4000:]}"
    return output
