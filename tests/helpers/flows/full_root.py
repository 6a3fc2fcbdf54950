"""Evaluate a trained root on a real file system that fills up while figures, pictures and report are written.

Run inside a mount namespace of its own; prints what each `functa evaluate` that had too little space printed, as a
line of JSON: unshare --map-root-user --mount python -m tests.helpers.flows.full_root FOLDER
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.flows.comparable import comparable
from tests.helpers.flows.prefect_server import PROJECT, clean_environment
from tests.helpers.flows.tiny_config import TINY

SETTINGS = TINY
FREE = (4 << 10, 200 << 10)  # bytes: at the first object that is written, and in the middle


def functa(command: str, root: Path, home: Path) -> subprocess.CompletedProcess[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    code = "from functa.flows.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, command, "digits", *sets, "--root", str(root)],
        cwd=PROJECT, env=clean_environment(home), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def fill_up(ballast: Path, free: int) -> None:
    """Take all space of the file system but so many bytes."""
    space = os.statvfs(ballast.parent)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - free)


def main(folder: Path) -> None:
    disk, home = folder / "disk", folder / "home"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    done = functa("run", folder / "reference", home)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "reference", disk / "root")
    for key in ("stages/evaluate.json", "metrics.json", "report.html"):
        (disk / "root" / key).unlink()
    shutil.rmtree(disk / "root" / "runs")
    for free in FREE:
        fill_up(disk / "ballast", free)
        done = functa("evaluate", disk / "root", home)
        print(json.dumps([done.returncode, done.stderr]), flush=True)
        (disk / "ballast").unlink()
    done = functa("evaluate", disk / "root", home)
    assert done.returncode == 0, done.stderr
    found, wanted = comparable(disk / "root"), comparable(folder / "reference")
    assert found == wanted, sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
