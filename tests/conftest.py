"""Shared by all tests: a Prefect home of their own, one Prefect server, and how two processes divide the files."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.storage.s3_servers import moto_server

# Every store, checkpoint and database is written through to its medium, for which the tests would wait most of their
# time where that is a disk.
MEMORY = Path("/dev/shm")
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and shutil.disk_usage(MEMORY).free > 4 << 30
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
):
    os.environ["TMPDIR"] = str(MEMORY)
    tempfile.tempdir = None  # it may have been read before

# Before anything imports Prefect: nothing of this machine's Prefect reaches a test, and the test processes of xdist
# do not wait for each other's database.
for _variable in ("PREFECT_HOME", "XDG_DATA_HOME"):
    os.environ[_variable] = tempfile.mkdtemp(prefix="functa-tests-")
    atexit.register(shutil.rmtree, os.environ[_variable], ignore_errors=True)
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

# The tests start some two hundred processes. Where bytecode is not kept, each of them compiles torch and Prefect again,
# which takes longer than what most of them then do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts what it runs in the background with Ctrl-C ignored, which every process under it inherits; the tests of
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Beside other test processes a core each: threads that meet after every operation would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make fuzz`: tests without a number of their own generate many more inputs.
if "HYPOTHESIS_PROFILE" in os.environ:
    import hypothesis

    hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None)
    hypothesis.settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])

SHARED = Path(__file__).parents[2] / "shared"
PROJECT = Path(__file__).parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file whose tests share a fixture goes to one process, any other test to whichever is free; long files first.

    The groups of xdist 3.8 have no effect under pytest 9.2 (pytest-xdist issue 1386): every shared server and training
    was started in both processes. The one that hands the tests out collects none, so it goes by the file's text.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in shared else nodeid

    files = sorted((PROJECT / "tests").rglob("test_*.py"))
    shared = {str(file.relative_to(PROJECT)) for file in files if 'scope="module"' in file.read_text()}
    return ByFixture(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: one that comes last would leave the other processes idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server, one for each test process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def moto() -> Iterator[dict[str, str]]:
    """The environment of clients of moto's S3 server, one for each test process."""
    with moto_server() as environment:
        yield environment


@pytest.fixture(scope="session")
def shared() -> Path:
    """The image sets beside the checkout; a test that needs them is skipped when they are missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED
