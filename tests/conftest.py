"""What all tests share: a Prefect home of their own, and one server for those that need one."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Prefect: nothing of this machine's Prefect reaches a test, and the test processes of xdist
# do not wait for each other's database.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="functa-prefect-")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

# The tests start some two hundred processes. Where bytecode is not kept, each of them compiles torch and Prefect again,
# which takes longer than what most of them then do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Beside other test processes a core each: threads that meet after every operation would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with an empty database, for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def shared() -> Path:
    """The image sets beside the checkout; a test that needs them says so when they are missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED
