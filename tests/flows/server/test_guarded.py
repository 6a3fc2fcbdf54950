"""Requests of a foreign page, which a browser sends for it, are refused, over HTTP and WebSockets; own ones pass."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from functa.flows.server.guarded import Guard, fault_of

Headers = dict[str, str]

PASS: dict[str, Headers] = {
    "a program": {"host": "127.0.0.1:4200"},
    "the UI": {"host": "127.0.0.1:4200", "origin": "http://127.0.0.1:4200"},
    "the UI by name": {"host": "127.0.0.1:4200", "origin": "http://localhost:4200"},
    "a forwarded port": {"host": "localhost:8080", "origin": "http://localhost:8080"},
    "IPv6": {"host": "[::1]:4200", "origin": "http://[::1]:4200"},
}

REFUSED: dict[str, Headers] = {
    "another origin": {"host": "127.0.0.1:4200", "origin": "https://evil.example"},
    "another port of this machine": {"host": "127.0.0.1:4200", "origin": "http://localhost:3000"},
    "a page without an origin": {"host": "127.0.0.1:4200", "origin": "null"},
    "an origin that begins alike": {"host": "127.0.0.1:4200", "origin": "http://127.0.0.1.evil.example:4200"},
    "an origin with a user": {"host": "127.0.0.1:4200", "origin": "http://127.0.0.1:4200@evil.example"},
    "a rebound name": {"host": "evil.example:4200"},
    "a rebound name of the same origin": {"host": "evil.example:4200", "origin": "http://evil.example:4200"},
    "a name that ends alike": {"host": "localhost.evil.example:4200"},
    "no host": {},
    "garbled": {"host": "[::1", "origin": "http://[::1"},
}


def raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def answer(kind: str, headers: Headers) -> list[MutableMapping[str, Any]]:
    """Return what the guard sends; empty if the application got the request."""
    sent: list[MutableMapping[str, Any]] = []

    async def application(*_: Any) -> None:
        sent.clear()
        sent.append({"type": "passed"})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": f"{kind}.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Guard(application)({"type": kind, "headers": raw(headers)}, receive, send))
    return sent


@pytest.mark.parametrize("headers", PASS.values(), ids=PASS)
def test_requests_of_this_machine_pass(headers: Headers) -> None:
    for kind in ("http", "websocket"):
        assert answer(kind, headers) == [{"type": "passed"}]


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
def test_requests_of_other_pages_are_refused(headers: Headers) -> None:
    assert fault_of(raw(headers))
    (start, body) = answer("http", headers)
    assert start["status"] == 403
    assert body["body"].startswith(b"refused: ")
    (close,) = answer("websocket", headers)
    assert close["type"] == "websocket.close"  # before it was accepted


def test_two_hosts_or_origins_are_refused_if_one_is_foreign() -> None:
    own, foreign = (b"origin", b"http://127.0.0.1:4200"), (b"origin", b"https://evil.example")
    host = (b"host", b"127.0.0.1:4200")
    assert fault_of([host, own]) == ""
    assert fault_of([host, own, foreign])
    assert fault_of([host, (b"host", b"evil.example")])
