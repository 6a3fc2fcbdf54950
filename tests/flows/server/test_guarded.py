"""Requests of a foreign page, which a browser sends for it, are refused, over HTTP and WebSockets; own ones pass."""

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from functa.flows.server.api import basic
from functa.flows.server.guarded import Guard, fault_of, start_in_turn, write_in_turn

Headers = dict[str, str]

SERVER = ("127.0.0.1", 4200)

PASSWORD = "functa:secret"

PASS: dict[str, Headers] = {
    "a program": {"host": "127.0.0.1:4200"},
    "the UI": {"host": "127.0.0.1:4200", "origin": "http://127.0.0.1:4200"},
    "the UI by name": {"host": "127.0.0.1:4200", "origin": "http://localhost:4200"},
    "a forwarded port": {"host": "localhost:8080", "origin": "http://localhost:8080"},
    "a link in another page": {
        "host": "127.0.0.1:4200",
        "sec-fetch-site": "cross-site",
        "sec-fetch-dest": "document",
    },
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
    "a picture, a script or a frame in a page of another port": {
        "host": "127.0.0.1:4200",
        "sec-fetch-site": "same-site",
        "sec-fetch-dest": "iframe",
    },
    "a picture in a page of another site": {
        "host": "127.0.0.1:4200",
        "sec-fetch-site": "cross-site",
        "sec-fetch-dest": "image",
    },
    "no host": {},
    "garbled": {"host": "[::1", "origin": "http://[::1"},
}


def raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def answer(
    kind: str, headers: Headers, path: str = "/api/flows/filter", query: str = ""
) -> list[MutableMapping[str, Any]]:
    """Return what the guard sends; empty if the application got the request."""
    sent: list[MutableMapping[str, Any]] = []

    async def application(scope: MutableMapping[str, Any], *_: Any) -> None:
        given = [value.decode() for name, value in scope["headers"] if name == b"authorization"]
        sent.append({"type": "passed", "given": given})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": f"{kind}.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": raw(headers), "path": path, "query_string": query.encode(), "server": SERVER}
    asyncio.run(Guard(application, PASSWORD)(scope, receive, send))
    return sent


@pytest.mark.parametrize("headers", PASS.values(), ids=PASS)
def test_requests_of_this_machine_pass(headers: Headers) -> None:
    for kind in ("http", "websocket"):
        assert answer(kind, headers) == [{"type": "passed", "given": []}]


@pytest.mark.attacks
@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
def test_requests_of_other_pages_are_refused(headers: Headers) -> None:
    assert fault_of(raw(headers))
    (start, body) = answer("http", headers)
    assert start["status"] == 403
    assert b"Refused: " in body["body"]
    (close,) = answer("websocket", headers)
    assert close["type"] == "websocket.close"  # before it was accepted


def test_two_hosts_or_origins_are_refused_if_one_is_foreign() -> None:
    own, foreign = (b"origin", b"http://127.0.0.1:4200"), (b"origin", b"https://evil.example")
    host = (b"host", b"127.0.0.1:4200")
    assert fault_of([host, own]) == ""
    assert fault_of([host, own, foreign])
    assert fault_of([host, (b"host", b"evil.example")])


OWN = {"host": "127.0.0.1:4200"}
GIVEN = [{"type": "passed", "given": [basic(PASSWORD)]}]


def test_a_browser_without_the_cookie_gets_401_for_pages_and_no_password_for_the_api() -> None:
    for cookies in ({}, {"cookie": "functa-4200=wrong"}, {"cookie": "functa-80=secret"}, {"cookie": "functa-4200="}):
        (start, _) = answer("http", OWN | cookies, "/runs")
        assert start["status"] == 401
        assert answer("http", OWN | cookies) == [{"type": "passed", "given": []}]


def test_the_cookie_replaces_the_password_over_http_and_not_for_sockets() -> None:
    logged_in = OWN | {"cookie": "_x={bad; functa-4200=secret", "authorization": "Basic of-another-server"}
    for path in ("/runs", "/api/flows/filter"):
        assert answer("http", logged_in, path) == GIVEN
    assert answer("websocket", OWN | {"cookie": "functa-4200=secret"}) == [{"type": "passed", "given": []}]


def test_a_program_with_the_password_reads_the_uis_settings() -> None:
    assert answer("http", OWN | {"authorization": basic(PASSWORD)}, "/assets/x.js") == GIVEN


def test_the_link_sets_the_cookie_and_leads_on_to_the_same_page_without_the_token() -> None:
    (again, _) = answer("http", OWN | {"cookie": "functa-4200=secret"}, "/", "token=secret")
    (start, page) = answer("http", OWN, "//evil.example/<b>", "token=secret")
    assert start["status"] == again["status"] == 200
    headers = dict(start["headers"])
    assert headers[b"set-cookie"] == b"functa-4200=secret; Path=/; HttpOnly; SameSite=Strict"
    assert headers[b"cache-control"] == b"no-store"
    assert b'content="0;url=/evil.example/%3Cb%3E"' in page["body"]
    assert b"secret" not in page["body"]


@pytest.mark.parametrize("query", ["token=", "token=wrong", "token=secretsecret", "", "token=%ff", "other=secret"])
def test_another_token_sets_nothing(query: str) -> None:
    (start, _) = answer("http", OWN, "/", query)
    assert start["status"] == 401
    assert b"set-cookie" not in dict(start["headers"])


def test_servers_of_one_folder_start_one_after_another(tmp_path: Path) -> None:
    """Two that made one database at the same time would fail: "Application startup failed"."""
    at_start: list[str] = []

    def application(name: str) -> Any:
        async def start(scope: Any, receive: Any, send: Any) -> None:
            at_start.append(name)
            await asyncio.sleep(0.05)
            assert at_start.pop() == name
            await send({"type": "lifespan.startup.complete"})
            await both.wait()  # serving: the other has started by then

        return start_in_turn(start, tmp_path)

    async def receive() -> Any:
        """Ask for nothing."""

    async def send(message: Any) -> None:
        started.append(message)
        if len(started) == 2:
            both.set()

    async def run() -> None:
        servers = [application(name)({"type": "lifespan"}, receive, send) for name in ("one", "other")]
        await asyncio.wait_for(asyncio.gather(*servers), 30)

    both, started = asyncio.Event(), list[Any]()
    asyncio.run(run())
    assert len(started) == 2


def test_a_transaction_that_reads_before_it_writes_waits_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, SQLite refuses its write: "database is locked"."""
    from prefect.server.database.configurations import AioSqliteConfiguration

    monkeypatch.setattr(AioSqliteConfiguration, "begin_transaction", AioSqliteConfiguration.begin_transaction)
    write_in_turn()
    configuration = AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path}/prefect.db")

    async def add() -> None:
        async with await configuration.session(await configuration.engine()) as session:
            async with configuration.begin_transaction(session):
                (count,) = (await session.execute(text("SELECT count(*) FROM t"))).one()
                await asyncio.sleep(0.05)  # for the others to read, too
                await session.execute(text(f"INSERT INTO t VALUES ({count})"))

    async def run() -> list[int]:
        engine = await configuration.engine()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE t (n INTEGER)"))
        await asyncio.gather(*(add() for _ in range(4)))
        async with engine.connect() as connection:
            return list((await connection.execute(text("SELECT n FROM t ORDER BY n"))).scalars())

    assert asyncio.run(run()) == [0, 1, 2, 3]
