"""Run the command as tests do, within their process, or as a person does."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from functa.flows.cli.main import main

PROJECT = Path(__file__).parents[3]


def here(*arguments: str, folder: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has torch loaded: for tests of its output and status alone."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["functa", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), errors.getvalue())


def functa(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, in a process of its own."""
    code = "from functa.flows.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def error_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the one line of an error, after checking that it is the only one."""
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("functa: ")
    return lines[0]
