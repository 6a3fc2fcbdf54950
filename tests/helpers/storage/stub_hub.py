"""A hub on loopback: the part of its API that exports use. Repositories are in memory, their revisions stay."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN, READER = "hf_writer", "hf_reader"

LFS_BYTES = 4096  # files from this size on go through its large file storage

Files = dict[str, bytes]


@dataclass
class Repository:
    """The revisions of a repository, oldest first; the first is the one that the hub itself makes."""

    private: bool = False
    revisions: list[tuple[str, Files]] = field(default_factory=list)

    @property
    def files(self) -> Files:
        return self.revisions[-1][1]

    def commit(self, files: Files) -> str:
        name = hashlib.sha1(f"{len(self.revisions)} {sorted(files)}".encode()).hexdigest()
        self.revisions.append((name, files))
        return name

    def at(self, revision: str) -> tuple[str, Files] | None:
        if revision == "main":
            return self.revisions[-1]
        return next((each for each in self.revisions if each[0] == revision), None)


@dataclass
class StubHub:
    """A running hub: its address, its repositories by "models/USER/NAME", and what it was asked."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: Files = field(default_factory=dict)  # by sha256
    requests: list[str] = field(default_factory=list)
    fails: Callable[[str], int] = lambda request: 0  # the status of a request that is to fail

    def model(self, name: str) -> Repository:
        return self.repositories[f"models/{name}"]

    def dataset(self, name: str) -> Repository:
        return self.repositories[f"datasets/{name}"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._act()

    do_HEAD = do_POST = do_PUT = do_GET

    def _act(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if status := self.hub.fails(request):
            return self._answer(status, {"error": "it was asked to fail"})
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return act(self, body, **match.groupdict())
        return self._answer(404, {"error": f"unknown: {request}"})

    def _answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _writes(self) -> bool:
        """Answer a request that may not write; return whether it may."""
        if self._token() == TOKEN:
            return True
        known = self._token() == READER
        self._answer(403 if known else 401, {"error": "no right to write" if known else "invalid credentials"})
        return False

    def _repository(self, kind: str, name: str) -> Repository | None:
        """Return a repository that the caller may read, after an answer if there is none."""
        found = self.hub.repositories.get(f"{kind}/{name}")
        if found is None or (found.private and self._token() not in (TOKEN, READER)):
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def create(self, body: bytes) -> None:
        if not self._writes():
            return None
        asked = json.loads(body)
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked['organization']}/{asked['name']}"
        if f"{kind}/{name}" in self.hub.repositories:
            return self._answer(409, {"error": "exists"})
        made = self.hub.repositories[f"{kind}/{name}"] = Repository(asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        prefix = "datasets/" if kind == "datasets" else ""
        return self._answer(200, {"url": f"{self.hub.endpoint}/{prefix}{name}", "name": name})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if "\nlicense: " in content else [{"message": '"license" is required'}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def tree(self, _: bytes, kind: str, name: str, revision: str) -> None:
        if (found := self._repository(kind, name)) is not None:
            _, files = found.at(revision) or ("", {})
            self._answer(200, [self._listed(path, data) for path, data in files.items()])

    def _listed(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if len(data) >= LFS_BYTES:
            large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entry |= {"oid": "0" * 40, "lfs": large}
        return entry

    def info(self, _: bytes, kind: str, name: str, revision: str = "main") -> None:
        if (found := self._repository(kind, name)) is None:
            return
        if (at := found.at(revision)) is None:
            self._answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        else:
            self._answer(200, {"id": name, "sha": at[0], "private": found.private, "siblings": []})

    def preupload(self, body: bytes, kind: str, name: str) -> None:
        modes = [
            {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LFS_BYTES else "regular",
             "shouldIgnore": False, "oid": None}
            for each in json.loads(body)["files"]
        ]  # fmt: skip
        self._answer(200, {"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        if not self._writes():
            return
        objects = [
            each if each["oid"] in self.hub.large
            else each | {"actions": {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, kind: str, name: str) -> None:
        if not self._writes():
            return
        found = self.hub.repositories[f"{kind}/{name}"]
        files = dict(found.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = found.commit(files)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def resolve(self, _: bytes, name: str, revision: str, path: str, kind: str | None = None) -> None:
        if (found := self._repository(kind or "models", name)) is None:
            return
        at = found.at(revision)
        if at is None or path not in at[1]:
            self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            return
        data = at[1][path]
        etag = hashlib.sha256(data).hexdigest()
        self._answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=at[0], Accept_Ranges="none")


REPO = r"(?P<name>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/api/{KIND}/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/{KIND}/{REPO}", _Handler.info),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/main", _Handler.preupload),
    ("POST", rf"/api/{KIND}/{REPO}/commit/main", _Handler.commit),
    ("POST", rf"(?:/datasets)?/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", _Handler.put_large),
    ("GET HEAD", rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Run a hub; inside, the hub's client uses it, with the right to write."""
    from huggingface_hub import constants

    hub = StubHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", hub.endpoint)
            patch.setenv("HF_TOKEN", TOKEN)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
