"""Locations for storage tests: a folder, and buckets of moto's S3 server and of a real one (`make test-s3`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.storage.ceph import Ceph, running
from tests.helpers.storage.ceph_packages import Unavailable
from tests.helpers.storage.locations import Home, Prefix, new_bucket
from tests.helpers.storage.s3_servers import SERVERS, server_environment


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the real server only for those who ask for it (-m s3): it may have to be downloaded first.

    What a location on S3 promises is tested in places/; that a functaset needs no more of it is a slow test.
    """
    for item in items:
        if item.path.parent.name == "functaset" and "[moto" in item.name:
            item.add_marker(pytest.mark.slow)
    if "s3" not in config.option.markexpr:
        real = [item for item in items if item.get_closest_marker("s3")]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """The real server."""
    try:
        with running() as server:
            yield server
    except Unavailable as missing:
        pytest.fail(f"ceph: {missing}", pytrace=False)


@pytest.fixture(params=SERVERS)
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """s3:// and the name of an empty bucket, on either server."""
    with new_bucket(server_environment(request)) as name:
        yield f"s3://{name}"


@pytest.fixture(params=["folder", *SERVERS])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """An empty location: on disk, on moto's server, on the real one."""
    if request.param == "folder":
        yield tmp_path
        return
    with new_bucket(server_environment(request)) as name:
        yield Prefix(f"s3://{name}")
