"""Benchmarks as a user calls them: a script, its options, what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]


def run(name: str, *options: str | Path) -> str:
    """Run benchmarks/NAME.py and return what it prints; fail with its errors."""
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, options)]
    # One thread: nothing is timed here, and on a busy machine threads that meet after every operation take minutes.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(name: str, *options: str | Path) -> Any:
    """Run a benchmark and return the one JSON line that it prints."""
    (line,) = run(name, *options).splitlines()
    return json.loads(line)
