"""Faults of S3 are one line that names the thing, the fault and the fix, on moto's server and on a real one."""

import io
import logging
import os
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from functa.storage.errors import StorageError, TransientError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.address import open_location
from functa.storage.places.s3 import S3Location
from functa.storage.places.s3_faults import masked
from tests.helpers.storage.ceph import Ceph, User
from tests.helpers.storage.functasets import filled
from tests.helpers.storage.locations import clients_of_this_environment, new_bucket, zarr_store


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        with clients_of_this_environment():
            yield


def faults_of(place: S3Location) -> list[str]:
    """Return the errors of a write, read, list and look-up; each is one line that names bucket, endpoint and key."""
    acts: list[Callable[[], object]] = [
        place.preflight_write,
        lambda: replace(place, tries=1).read("a/b"),
        lambda: replace(place, tries=1).list("a"),
        lambda: replace(place, tries=1).entry("a/b"),
    ]
    lines = []
    for act in acts:
        with pytest.raises(StorageError) as error:
            act()
        assert not isinstance(error.value, TransientError) or "does not answer" in str(error.value)
        lines.append(str(error.value))
    for line in lines:
        assert "\n" not in line
        assert place.uri in line
        assert os.environ["AWS_ENDPOINT_URL"].rpartition("@")[2] in line
        key = os.environ.get("AWS_ACCESS_KEY_ID")
        assert masked(key) in line
        assert not key or key not in line
    return lines


def place_in(bucket: str) -> S3Location:
    found = open_location(f"{bucket}/x")
    assert isinstance(found, S3Location)
    return found


def dead_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_missing_bucket(bucket: str) -> None:
    place = place_in("s3://no-such-bucket")
    for act in (place.preflight_write, lambda: place.read("a"), place.list, lambda: Functaset.open(place)):
        with pytest.raises(StorageError, match=r"there is no bucket 'no-such-bucket' \(.*key AKIA…") as error:
            act()
        assert "create it, or correct the address" in str(error.value)


def test_a_dead_endpoint_is_reported_within_seconds(bucket: str) -> None:
    with environment(AWS_ENDPOINT_URL=dead_endpoint()):
        for line in faults_of(place_in(bucket)):
            assert "the endpoint does not answer" in line
    with environment(AWS_ENDPOINT_URL="http://no-such-host.invalid:80"):
        assert "the endpoint does not answer" in faults_of(place_in(bucket))[0]


def test_an_endpoint_that_is_no_address(bucket: str) -> None:
    with environment(AWS_ENDPOINT_URL="127.0.0.1:80"):
        assert "the endpoint is no address" in faults_of(place_in(bucket))[0]


def test_no_credentials(bucket: str, tmp_path: Path) -> None:
    none = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"}
    files = {name: str(tmp_path / name) for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")}
    with environment(**none, **files):
        for line in faults_of(place_in(bucket)):
            assert "no credentials were found" in line
            assert "AWS_ACCESS_KEY_ID" in line


def test_https_to_a_server_of_plain_http(bucket: str) -> None:
    with environment(AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"].replace("http", "https")):
        for line in faults_of(place_in(bucket)):
            assert "TLS fails" in line
            assert "AWS_CA_BUNDLE" in line


def test_a_certificate_that_nobody_vouches_for(bucket: str, tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    context.wrap_socket(listener.accept()[0], server_side=True).close()
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        with environment(AWS_ENDPOINT_URL=f"https://127.0.0.1:{listener.getsockname()[1]}"):
            assert "TLS fails" in faults_of(place_in(bucket))[0]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def real_bucket(ceph: Ceph) -> Iterator[str]:
    """moto takes every key and secret for right."""
    with new_bucket(ceph.environment()) as name:
        open_location(f"s3://{name}/x").write("a/b", b"x")
        yield f"s3://{name}"


@pytest.mark.s3
def test_a_wrong_secret(real_bucket: str) -> None:
    with environment(AWS_SECRET_ACCESS_KEY="wrong"):
        for line in faults_of(place_in(real_bucket)):
            assert f"the secret is not that of key {masked(os.environ['AWS_ACCESS_KEY_ID'])}" in line


@pytest.mark.s3
def test_an_unknown_key(real_bucket: str) -> None:
    with environment(AWS_ACCESS_KEY_ID="AKIANOBODYKNOWSXY12"):
        for line in faults_of(place_in(real_bucket)):
            assert "key AKIA…XY12 is unknown there" in line


@pytest.mark.attacks
@pytest.mark.s3
def test_a_key_without_rights(real_bucket: str, ceph: Ceph) -> None:
    stranger: User = ceph.stranger
    with environment(AWS_ACCESS_KEY_ID=stranger.key, AWS_SECRET_ACCESS_KEY=stranger.secret):
        lines = faults_of(place_in(real_bucket))
    for line, operation in zip(lines, ("PutObject", "GetObject", "ListObjectsV2", "ListObjectsV2")):
        assert f"key {masked(stranger.key)} may not {operation}" in line
        assert "grant it that right" in line


@pytest.mark.attacks
def test_secrets_are_in_nothing_that_is_kept_shown_logged_or_raised(
    bucket: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    shown = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        place = filled(f"{bucket}/store")
        for held in (place, place.child("a"), Functaset.open(place).location, zarr_store(place)):
            shown.write(f"{held!r} {held}")
        shown.write(repr(pickle.dumps(place)))
        with environment(AWS_ENDPOINT_URL=dead_endpoint()):
            for line in faults_of(place_in(bucket)):
                shown.write(line)
        with environment(AWS_ENDPOINT_URL=dead_endpoint().replace("//", f"//user:{secret}@")):
            with pytest.raises(StorageError, match="has a user or password in it") as error:
                place.list()
            shown.write(str(error.value))
        try:
            open_location("s3://no-such-bucket/x").write("a", b"")
        except StorageError:
            shown.write(traceback.format_exc())
    shown.write("".join(capfd.readouterr()))
    shown.write(caplog.text)
    assert secret not in shown.getvalue()
    assert len(shown.getvalue()) > 10_000
    objects = [place.read(key) for key in place.list()]
    assert len(objects) > 20
    assert not any(secret.encode() in data for data in objects)


FORK = """
import os, signal, sys
from functa.storage.places.address import open_location
from tests.helpers.storage.locations import zarr_store
place = open_location(sys.argv[1])
if sys.argv[2] == "used":
    place.write("k", b"x")
store = zarr_store(place) if sys.argv[2] == "zarr" else None
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(20)  # a hang is what must not be
try:
    if store is not None:
        import zarr
        zarr.open_group(store, mode="r", zarr_format=3)
    mine = open_location(sys.argv[1]) if sys.argv[2] == "reopened" else place.child("a")
    mine.list()
    print("worked")
except Exception as error:
    print(error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["made", "used", "reopened", "local"])
def test_after_a_fork_an_s3_location_is_refused_with_the_fix_and_a_new_or_local_one_works(
    bucket: str, tmp_path: Path, how: str
) -> None:
    uri = str(tmp_path) if how == "local" else f"{bucket}/forked"
    command = [sys.executable, "-c", FORK, uri, "used" if how == "local" else how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if how in ("reopened", "local"):
        assert done.stdout == "worked\n"
    else:
        assert "is used in its fork" in done.stdout
        assert "multiprocessing_context='spawn'" in done.stdout
        assert done.stdout.count("\n") == 1


def test_a_place_that_was_sent_to_another_process_belongs_to_it(bucket: str) -> None:
    place = replace(place_in(bucket), process=os.getpid() + 1)
    with pytest.raises(StorageError, match="fork"):
        place.list()
    assert pickle.loads(pickle.dumps(place)).list() == []
