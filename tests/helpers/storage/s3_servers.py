"""S3 servers for tests: moto's within `make test`, a real one for tests marked s3 (`make test-s3`)."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.s3)]


@contextlib.contextmanager
def moto_server() -> Iterator[dict[str, str]]:
    """Run moto's S3 server, which accepts any secret; yield the environment of its clients."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    # Its S3 alone: the server of everything looks up for each request, on disk, which of AWS's services is meant.
    application = atomic(create_backend_app("s3"))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "AKIAMOTOMOTOXY12",
            "AWS_SECRET_ACCESS_KEY": "canary-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.shutdown()
        thread.join()


def atomic(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Let create-only writes happen in turn: moto looks and then writes, and two at once may both find nothing."""
    lock = threading.Lock()

    def one_by_one(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with lock if "HTTP_IF_NONE_MATCH" in environment else contextlib.nullcontext():
            return application(environment, start)

    return one_by_one


def server_environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the AWS_ variables of the server that a fixture is parametrised with; start it if it does not run yet."""
    if request.param == "moto":
        return dict(request.getfixturevalue("moto"))
    return dict(request.getfixturevalue("ceph").environment())
