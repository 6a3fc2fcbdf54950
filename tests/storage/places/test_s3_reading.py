"""Reading and listing a bucket: few requests, the versions that earlier releases recorded, and no false answer."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from functa.storage.errors import TransientError
from functa.storage.places.address import open_location
from functa.storage.places.location import Entry, Location
from functa.storage.places.s3 import S3Location
from functa.storage.places.s3_fast import FAULTS
from functa.storage.places.s3_retries import TRIES
from tests.helpers.storage.locations import clients_of_this_environment

HOSTILE = [
    "a b.png", "a+b.png", "a%20b.png", "50%.png", "ü/é.png", "&amp;<x>.png", "'\".png", "#?.png", "~.png", "a..b.png",
    "日本/語.png", "tab\there.png", "a.partial.png", "=;,:@$!*().png", "\\.png",
]  # fmt: skip


def entries_by_s3fs(location: Location) -> list[Entry]:
    """List as releases up to 0.2 did, whose tokens are in functasets."""
    import fsspec

    base = f"{location.uri.removeprefix('s3://')}/"
    found = fsspec.filesystem("s3", use_listings_cache=False).find(base, detail=True)
    return [
        Entry(path.removeprefix(base), each["size"], each["ETag"].strip('"'), each["LastModified"].timestamp())
        for path, each in sorted(found.items())
        if each["type"] == "file" and not path.endswith(("/", ".partial"))
    ]


def test_versions_are_those_that_s3fs_listed_so_that_nothing_is_encoded_again(bucket: str) -> None:
    place = open_location(f"{bucket}/images")
    for number, key in enumerate(HOSTILE):
        place.write(key, b"x" * number)
    import fsspec

    for mark in ("", "a", "a/b"):  # as consoles make folders
        name = f"images/{mark}/".replace("//", "/")
        fsspec.filesystem("s3").call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=name, Body=b"")
    expected = entries_by_s3fs(place)
    assert [entry.key for entry in expected] == sorted(HOSTILE)
    assert place.entries() == expected
    listing = place.listing()
    assert list(listing.keys) == [entry.key for entry in expected]
    assert list(listing.tokens) == [entry.token for entry in expected]
    with ThreadPoolExecutor(1) as pool:  # outside the main thread obstore reads
        by_obstore = list(pool.map(place.versioned, [entry.key for entry in expected]))
    for entry, fast in zip(expected, by_obstore, strict=True):
        found = place.versioned(entry.key)
        assert found is not None
        assert fast == found
        assert found[0] == replace(entry, modified=found[0].modified)
        assert abs(found[0].modified - entry.modified) < 1  # headers have whole seconds
        assert found[1] == place.read(entry.key) == b"x" * entry.size
        assert place.entry(entry.key) == found[0]


def test_an_object_is_read_with_its_version_or_not_at_all(bucket: str) -> None:
    place = open_location(f"{bucket}/x")
    place.write("a", b"0123456789")
    entry = place.entry("a")
    assert entry is not None
    whole, part = place.versioned, place.versioned_part
    for run in (in_a_thread, lambda act: act()):
        assert run(lambda: whole("a")) == run(lambda: whole("a", limit=10)) == (entry, b"0123456789")
        assert run(lambda: whole("a", limit=9)) == (entry, b"")
        assert run(lambda: part("a", 2, 3)) == (entry, b"234")
        assert run(lambda: part("a", 8, 30)) == (entry, b"89")
        assert run(lambda: part("a", 10, 3)) == run(lambda: part("a", 1, 0)) == (entry, b"")
        assert [run(lambda act=act: act()) for act in (lambda: whole("none"), lambda: part("none", 0, 3))] == [None] * 2
    assert part("none", 0, 0) is None


def test_threads_read_their_own_objects(bucket: str) -> None:
    place = open_location(f"{bucket}/x")
    keys = [f"{i:02d}" for i in range(12)]
    for key in keys:
        place.write(key, key.encode() * 1000)
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(place.read, keys * 4)) == [key.encode() * 1000 for key in keys * 4]
        found = pool.map(place.versioned, keys * 4)
        assert [each and each[1] for each in found] == [key.encode() * 1000 for key in keys * 4]


SPACE = b'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'

LISTED = b"<Contents><Key>x/a%2Bb c</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><Size>3</Size></Contents>"


def listing(inside: bytes, root: bytes = b"ListBucketResult") -> bytes:
    return b"<%s %s><EncodingType>url</EncodingType>%s</%s>" % (root, SPACE, inside, root)


def answer(body: bytes, status: bytes = b"200 OK", length: int | None = None, header: bytes = b"") -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n%s\r\n%s" % (status, size, header, body)


@contextmanager
def scripted(*answers: bytes) -> Iterator[tuple[S3Location, list[bytes]]]:
    """A location on a server that gives these answers, one for each request and connection, then none; its requests."""
    requests: list[bytes] = []
    left = list(answers)

    def serve(client: socket.socket) -> None:
        with client, suppress(OSError):
            request = client.recv(1 << 16)
            requests.append(request.partition(b"\r\n")[0])
            if left:
                client.sendall(left.pop(0))
            elif answers:
                client.sendall(answer(b"", b"503 Slow Down"))
            else:
                time.sleep(60)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=accept, daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}", "AWS_ACCESS_KEY_ID": "AKIA",
            "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        with clients_of_this_environment():
            place = open_location("s3://bucket/x")
            assert isinstance(place, S3Location)
            yield replace(place, sleep=lambda _: None), requests
        listener.shutdown(socket.SHUT_RDWR)


WHOLE = answer(listing(b"<IsTruncated>false</IsTruncated>" + LISTED))

NO_LISTINGS = {
    "a page of a proxy": answer(b"<html><body>Please log in</body></html>"),
    "an error in an answer of status 200": answer(b"<Error><Code>SlowDown</Code><Message>m</Message></Error>"),
    "nothing": answer(b""),
    "a part of the XML": answer(listing(LISTED)[:-30]),
    "a part of the answer": answer(listing(LISTED)[:-30], length=9999),
    "no mark of the next page": answer(listing(b"<IsTruncated>true</IsTruncated>" + LISTED)),
    "an object without a size": answer(listing(b"<Contents><Key>x/a</Key></Contents>")),
    "a busy server": answer(b"", b"503 Slow Down"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", NO_LISTINGS)
def test_what_is_no_listing_is_asked_for_again_and_never_an_empty_one(fault: str) -> None:
    """Images that are missing from a listing would be retired."""
    with scripted(NO_LISTINGS[fault], WHOLE) as (place, requests):
        assert place.list() == ["a+b c"]
        assert len(requests) == 2


@pytest.mark.faults
def test_what_never_becomes_a_listing_is_one_line_that_shows_it() -> None:
    with scripted(*[NO_LISTINGS["a page of a proxy"]] * TRIES) as (place, requests):
        with pytest.raises(TransientError, match="the answer to a listing is none, 39 bytes: b'<html><body>Please"):
            place.listing()
        assert len(requests) == TRIES


def test_a_listing_is_one_request_for_a_thousand_objects() -> None:
    keys = [f"{number:04d}" for number in range(2500)]
    answers = []
    for start in (0, 1000, 2000):
        more = (
            b"<IsTruncated>true</IsTruncated><NextContinuationToken>m</NextContinuationToken>" if start < 2000 else b""
        )
        page = [LISTED.replace(b"a%2Bb c", key.encode()) for key in keys[start : start + 1000]]
        answers.append(answer(listing(more + b"".join(page))))
    with scripted(*answers) as (place, requests):
        assert list(place.listing().keys) == keys
        assert len(requests) == 3


@pytest.mark.faults
def test_a_page_that_was_lost_is_asked_for_again_by_itself() -> None:
    first = answer(
        listing(b"<IsTruncated>true</IsTruncated><NextContinuationToken>m+1</NextContinuationToken>" + LISTED)
    )
    second = answer(listing(LISTED.replace(b"x/a", b"x/b")))
    with scripted(first, answer(b"", b"500 Internal"), second) as (place, requests):
        assert place.list() == ["a+b c", "b+b c"]
        assert [b"continuation-token=m%2B1" in request for request in requests] == [False, True, True]


def test_a_listing_in_no_order_is_sorted() -> None:
    pages = answer(listing(LISTED + LISTED.replace(b"x/a", b"x/A")))
    with scripted(pages, pages, pages) as (place, _):
        assert place.list() == list(place.listing().keys) == ["A+b c", "a+b c"]


@pytest.mark.faults
@pytest.mark.parametrize("by", ["botocore", "obstore"])
@pytest.mark.parametrize("fault", ["short", "cut", "busy"])
def test_half_an_object_is_read_again(fault: str, by: str) -> None:
    """In the main thread obstore reads nothing: an interrupt would not end its wait."""
    half = {"short": answer(b"01234", length=10), "cut": b"HTTP/1.1 200 OK\r\nContent-", "busy": answer(b"", b"500 X")}
    whole = answer(b"0123456789", header=b'ETag: "e"\r\nLast-Modified: Mon, 30 Nov 2026 15:00:00 GMT\r\n')
    run = in_a_thread if by == "obstore" else lambda act: act()
    with scripted(half[fault], whole) as (place, requests):
        assert run(lambda: place.versioned("a")) == (Entry("a", 10, "e", 1796050800.0), b"0123456789")
        assert len(requests) == 2


def in_a_thread(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


@pytest.mark.faults
def test_what_is_never_whole_is_one_line_after_ten_requests_and_obstores_one() -> None:
    short = answer(b"01234", length=10)
    for run, more in ((in_a_thread, 1), (lambda act: act(), 0)):
        with scripted(*[short] * (TRIES + more)) as (place, requests):
            with pytest.raises(TransientError, match="s3://bucket/x/a: "):
                run(lambda: place.versioned("a"))
            assert len(requests) == TRIES + more


@pytest.mark.faults
def test_a_server_that_obstore_cannot_read_is_left_to_botocore() -> None:
    """Without this each object would take two requests."""
    whole = answer(b"0123456789", header=b"Last-Modified: Mon, 30 Nov 2026 15:00:00 GMT\r\n")  # and no etag
    with scripted(*[whole] * (2 * FAULTS + 3)) as (place, requests):
        for _ in range(FAULTS + 3):
            assert in_a_thread(lambda: place.versioned("a"))[1] == b"0123456789"
        assert len(requests) == 2 * FAULTS + 3


HANG = """
import sys
from functa.storage.places.address import open_location
place = open_location("s3://bucket/x")
print("begins", flush=True)
place.versioned("a") if sys.argv[1] == "read" else place.listing()
"""


@pytest.mark.faults
@pytest.mark.parametrize("what", ["read", "list"])
def test_an_interrupt_ends_a_request_that_hangs(what: str) -> None:
    with scripted() as (_, requests):
        process = subprocess.Popen([sys.executable, "-c", HANG, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 60
            while not requests:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - begun < 10, "it would have ended by itself after 30 s"
    assert errors.endswith(b"KeyboardInterrupt\n")


FORK = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
from functa.storage.places.address import open_location
def read():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(open_location(sys.argv[1]).versioned, "a").result()[1]
assert read() == b"x"
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(20)  # a hang is what must not be
os._exit(read() != b"x")
"""


def test_a_fork_of_a_process_that_read_by_obstore_reads_too(bucket: str) -> None:
    open_location(f"{bucket}/x").write("a", b"x")
    done = subprocess.run([sys.executable, "-c", FORK, f"{bucket}/x"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_settings_of_a_profile_are_those_of_reads_too(bucket: str, tmp_path: Path) -> None:
    place = open_location(f"{bucket}/x")
    place.write("a", b"x")
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = us-east-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        patch.setenv("AWS_PROFILE", "mine")
        with clients_of_this_environment():
            assert place.read("a") == b"x"
            assert place.list() == ["a"]
            assert not place.create("a", b"y")
