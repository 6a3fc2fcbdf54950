"""Prefect's server as this project starts it, closed to others: `python -m functa.flows.server.guarded --port N`.

Prefect itself demands the password of PREFECT_SERVER_API_AUTH_STRING, of every request to its API and of every
WebSocket. A browser gets it by a link, which sets a cookie; requests with that cookie are passed on with the password.

A browser lets any page send requests to this machine, and open WebSockets to it, as its user. So a request is refused
that names another origin than the server's own, or another host than this machine: a page can have its own host name
resolve to 127.0.0.1. Prefect's clients send no origin. WebSockets need the password itself: the UI opens none.
"""

import argparse
import asyncio
import hmac
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from filelock import FileLock

from functa.flows.server.api import HOST, LOOPBACK, SERVER_PASSWORD, STARTUP_SECONDS, basic

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

STOP_SECONDS = 20  # for requests that are being answered

UNKNOWN = "401: this server has a password. Open the link that <code>functa up</code> printed when it started."

Headers = list[tuple[bytes, bytes]]

Message = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Message]]

Send = Callable[[Message], Awaitable[None]]

App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that passes on what this machine's own programs and pages send.

    password: NAME:PASSWORD, which the application demands. Its second part is the token of the link.
    """

    def __init__(self, app: App, password: str) -> None:
        self._app, self._header = app, basic(password)
        self._token = password.partition(":")[2] or password

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403, or 401 where it is a page and the browser has no cookie."""
        kind = scope["type"]
        fault = fault_of(scope["headers"]) if kind in ("http", "websocket") else ""
        if kind == "websocket" and fault:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": fault})  # before it is accepted: status 403
        elif fault:
            await _answer(send, 403, f"Refused: {fault}.")
        elif kind != "http":
            await self._app(scope, receive, send)
        elif self._is_link(scope):
            await self._let_in(scope, send)
        elif self._is_known(scope):
            await self._pass_with_password(scope, receive, send)
        elif scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)  # which looks for the password
        else:
            await _answer(send, 401, UNKNOWN)

    def _is_link(self, scope: Message) -> bool:
        """Return whether this is the printed link."""
        tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return any(_same(self._token, each) for each in tokens)

    async def _let_in(self, scope: Message, send: Send) -> None:
        """Set the cookie, and lead on to the same address without the token.

        By a page, not a redirect: to that, a browser which follows a link of another page would not send the cookie.
        """
        cookie = f"{_cookie(scope)}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        where = escape("/" + quote(scope["path"].lstrip("/")), quote=True)
        page = f'<meta http-equiv="refresh" content="0;url={where}"><a href="{where}">Prefect UI</a>'
        await _answer(send, 200, page, [(b"set-cookie", cookie.encode())])

    def _is_known(self, scope: Message) -> bool:
        """Return whether the request has the link's cookie, or the password itself."""
        cookies = "; ".join(_values(scope["headers"], b"cookie")).split("; ")
        header = "".join(_values(scope["headers"], b"authorization"))
        return _same(self._header, header) or any(_same(f"{_cookie(scope)}={self._token}", each) for each in cookies)

    async def _pass_with_password(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on with the password, whatever other one the browser remembers for this address."""
        others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        scope = {**scope, "headers": [*others, (b"authorization", self._header.encode())]}
        with _no_question() if scope["path"].endswith("/ui-settings") else nullcontext():
            await self._app(scope, receive, send)


@contextmanager
def _no_question() -> Iterator[None]:
    """Let the UI's settings report that no password is needed: the cookie is enough."""
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_SERVER_API_AUTH_STRING}):
        yield


async def _answer(send: Send, status: int, text: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    page = f"<!doctype html><title>functa</title><p>{text}</p>\n"
    headers = [
        (b"content-type", b"text/html; charset=utf-8"), (b"cache-control", b"no-store"),
        (b"content-security-policy", b"default-src 'none'"), (b"referrer-policy", b"no-referrer"), *more,
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": page.encode()})


def _same(ours: str, theirs: str) -> bool:
    return hmac.compare_digest(ours.encode(), theirs.encode("utf-8", "surrogateescape"))


def _cookie(scope: Message) -> str:
    """Return the cookie's name. Browsers send a host's cookies to each of its ports: two servers must not share one."""
    return f"functa-{scope['server'][1]}"


def _values(headers: Headers, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]


def fault_of(headers: Headers) -> str:
    """Return why a request with these headers is refused, or an empty string."""
    hosts, origins = _values(headers, b"host"), _values(headers, b"origin")
    host = _address(f"//{hosts[0]}") if len(hosts) == 1 else None
    if host is None or host[0] not in LOOPBACK:
        return f"the host {escape(', '.join(hosts))} is not this machine; use http://{HOST}"
    for origin in origins:
        address = _address(origin) if "://" in origin else None
        if address is None or address[0] not in LOOPBACK or address[1] != host[1]:
            return f"a page of {escape(origin)} may not call this server"
    # Pictures, scripts and frames have no origin, and a page on another port of this machine would send the cookie.
    embedded = _values(headers, b"sec-fetch-dest") not in ([], ["document"])
    if embedded and _values(headers, b"sec-fetch-site") in (["cross-site"], ["same-site"]):
        return "a page of another origin may not embed this server's"
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


def start_in_turn(app: App, folder: Path) -> App:
    """Let servers of one folder start one after another: the first ones would make the same database at a time."""

    async def starting(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        lock = FileLock(folder / "server-starts.lock", thread_local=False)

        async def started(message: Message) -> None:
            lock.release()
            await send(message)

        await asyncio.to_thread(lock.acquire, timeout=STARTUP_SECONDS)
        try:
            await app(scope, receive, started)
        finally:
            lock.release()

    return starting


def write_in_turn() -> None:
    """Let each transaction of the server wait for those before it, where its database is SQLite.

    Prefect begins most of them as readers, and SQLite refuses at once a reader that begins to write after another has
    written. Beside three busy workers heartbeats and triggers were lost by it, and with them the news that a run had
    died.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_as_writer(
        self: AioSqliteConfiguration, session: "AsyncSession", with_for_update: bool = False
    ) -> "AsyncIterator[AsyncSessionTransaction]":
        async with begin(self, session, with_for_update=True) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_as_writer  # type: ignore[method-assign]


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

    home = get_current_settings().home
    settings = get_current_settings().server
    password = settings.api.auth_string.get_secret_value() if settings.api.auth_string else ""
    if not password:
        parser.error(f"{SERVER_PASSWORD} is not set: the server needs a password")
    write_in_turn()
    uvicorn.run(
        Guard(start_in_turn(create_app(final=True), home), password),
        host=HOST,
        port=arguments.port,
        lifespan="on",
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
        access_log=False,  # addresses of requests may hold the link's token
    )


if __name__ == "__main__":
    main()
