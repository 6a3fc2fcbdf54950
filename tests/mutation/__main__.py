"""Run the quick tests of a few files on every mutant of them: `make mutation`. A fault that no test notices is named.

Each mutant is one child process, forked once that the libraries are loaded; no file is changed. Status 1 if a mutant
survives that EXPLAINED does not list.
"""

import ast
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path

import hypothesis
import numpy  # noqa: F401  loaded before the forks, so that each of them has it at once
import pytest
import zarr  # noqa: F401

import tests.conftest  # noqa: F401  the folders of the tests' own are made once
from tests.mutation.explained import EXPLAINED
from tests.mutation.mutants import mutants_of

PROJECT = Path(__file__).parents[2]

COMMITS = (
    "tests/storage/functaset/test_commit.py", "tests/storage/functaset/test_old_commits.py",
    "tests/storage/functaset/test_growth.py", "tests/storage/functaset/test_contention.py",
    "tests/storage/upkeep/test_gc.py", "tests/storage/upkeep/test_gc_contention.py",
)  # fmt: skip

# What is mutated, and the tests that should notice it, quickest first.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "storage/images/rows.py": ("tests/storage/images/test_rows.py", "tests/storage/images/test_source.py"),
    "storage/functaset/quantizer.py": ("tests/storage/functaset/test_quantizer.py",),
    "storage/functaset/commit.py": COMMITS,
    "storage/functaset/committing/finished.py": COMMITS,
    "storage/functaset/committing/overlap.py": COMMITS,
    "storage/functaset/committing/split_moments.py": COMMITS,
    "tasks/evaluation/gate.py": ("tests/tasks/evaluation/test_gate.py",),
}  # fmt: skip

# Of pytest; of the project's fixtures only those of storage, since others load torch.
OPTIONS = (
    "-x", "-q", "-c", os.devnull, f"--rootdir={PROJECT}", "-p", "no:cacheprovider", "--noconftest",
    "-p", "tests.conftest", "-p", "tests.storage.conftest", "-k", "not moto", "-m", "not slow",
)  # fmt: skip

# Of one mutant's tests, beside three times what they compute without a fault, and in all: longer is a loop without end.
SPARE_SECONDS, SECONDS = 10, 1800.0


@dataclass
class Score:
    """The mutants of one file."""

    mutants: int = 0
    explained: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)


def main(files: list[str]) -> int:
    found_is_enough = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # and not made small
    hypothesis.settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, max_examples=30, phases=found_is_enough
    )
    hypothesis.settings.load_profile("mutation")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a fork has no threads of its parent's
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and each fork would load them
    scores = {file: _score(file) for file in files or SUBJECTS}
    for file, score in scores.items():
        killed = score.mutants - len(score.survivors) - len(score.explained)
        print(f"{file}: {score.mutants} mutants, {killed} killed, {len(score.explained)} explained survivors")
        for name in score.survivors:
            print(f"  survives: {name}")
    return 1 if any(score.survivors for score in scores.values()) else 0


def _score(file: str) -> Score:
    source = (PROJECT / file).read_text()
    before = _computed()
    if not _passes(file, ast.parse(source), resource.RLIM_INFINITY):
        raise SystemExit(f"{file}: its tests fail without a mutant; fix them first")
    most = round(3 * (_computed() - before)) + SPARE_SECONDS
    score = Score()
    for name, tree in mutants_of(source):
        score.mutants += 1
        if _passes(file, tree, most):
            (score.explained if name in EXPLAINED.get(file, {}) else score.survivors).append(name)
            print(f"{file}: {name} survives", file=sys.stderr, flush=True)
    return score


def _computed() -> float:
    """Return the seconds that all children until now have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _passes(file: str, tree: ast.Module, most: int) -> bool:
    """Return whether the file's tests pass, within so many seconds, in a child process where the file has this code."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            _test(file, tree, folder, most)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def _test(file: str, tree: ast.Module, folder: str, most: int) -> None:
    """Run the tests and end this process with their status."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        code = compile(tree, str(PROJECT / "functa" / file), "exec")
        module = f"functa.{file.removesuffix('.py').replace('/', '.')}"
        read = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: code if name == module else read(self, name)  # type: ignore[method-assign]
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        status = int(pytest.main([*OPTIONS, f"--basetemp={folder}/tests", *SUBJECTS[file]]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
