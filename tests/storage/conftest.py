"""S3 servers for tests: moto's within `make test`, a real one for what is marked s3 (`make test-s3`)."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.storage.ceph import Ceph, running
from tests.helpers.storage.ceph_packages import Unavailable
from tests.helpers.storage.locations import Home, Prefix, new_bucket

SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.s3)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The real server is only started for those who ask for it (-m s3): it may have to be downloaded first."""
    if "s3" not in config.option.markexpr:
        real = [item for item in items if item.get_closest_marker("s3")]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]


@pytest.fixture(scope="session")
def moto() -> Iterator[dict[str, str]]:
    """Environment of clients of moto's server, which takes any secret for right."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    # Its S3 alone: the server of everything looks up for each request, on disk, which of AWS's services is meant.
    application = atomic(create_backend_app("s3"))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIAMOTOMOTOXY12",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.shutdown()
    thread.join()


def atomic(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Create-only writes one after the other: moto looks and then writes, and two of them may both find nothing."""
    lock = threading.Lock()

    def one_by_one(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with lock if "HTTP_IF_NONE_MATCH" in environment else contextlib.nullcontext():
            return application(environment, start)

    return one_by_one


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
    """An empty place: on disk, on moto's server, on the real one."""
    if request.param == "folder":
        yield tmp_path
        return
    with new_bucket(server_environment(request)) as name:
        yield Prefix(f"s3://{name}")


def server_environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """AWS_ variables of the server that the fixture is parametrised with; it is started where it does not run yet."""
    if request.param == "moto":
        return dict(request.getfixturevalue("moto"))
    return dict(request.getfixturevalue("ceph").environment())
