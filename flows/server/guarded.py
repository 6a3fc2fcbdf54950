"""Prefect's server as this project starts it, closed to web pages: `python -m functa.flows.server.guarded --port N`.

A browser lets any page send requests to this machine, and open WebSockets to it, as its user. So a request is refused
that names another origin than the server's own, or another host than this machine: a page can have its own host name
resolve to 127.0.0.1. Prefect's clients send no origin.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from functa.flows.server.api import HOST

STOP_SECONDS = 20  # for requests that are being answered

LOOPBACK = (HOST, "localhost", "::1")

Message = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Message]]

Send = Callable[[Message], Awaitable[None]]

App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that passes on what this machine's own programs and pages send."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        fault = fault_of(scope["headers"]) if scope["type"] in ("http", "websocket") else ""
        if not fault:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": fault})  # before it is accepted: status 403
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"refused: {fault}\n".encode()})


def fault_of(headers: list[tuple[bytes, bytes]]) -> str:
    """Return why a request with these headers is refused, or an empty string."""
    hosts, origins = (
        [value.decode("latin-1") for name, value in headers if name == key] for key in (b"host", b"origin")
    )
    host = _address(f"//{hosts[0]}") if len(hosts) == 1 else None
    if host is None or host[0] not in LOOPBACK:
        return f"the host {', '.join(hosts)} is not this machine; use http://{HOST}"
    for origin in origins:
        address = _address(origin) if "://" in origin else None
        if address is None or address[0] not in LOOPBACK or address[1] != host[1]:
            return f"a page of {origin} may not call this server"
    return ""


def _address(url: str) -> tuple[str, int] | None:
    """Return host name and port, or None for what is no address."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return None


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with", daemon=True).start()


def main() -> None:
    """Serve Prefect's API, and the UI unless its setting is off, on this machine's own address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--end-with", type=int, metavar="PID", help="end when the process that started this has")
    arguments = parser.parse_args()
    if arguments.end_with is not None:
        end_with(arguments.end_with)
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    uvicorn.run(
        Guard(create_app(final=True)),
        host=HOST,
        port=arguments.port,
        lifespan="on",
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
