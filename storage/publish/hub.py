"""Repositories of the Hugging Face hub, or of another server at HF_ENDPOINT, as destination and origin of exports.

hf://USER/NAME is a repository of models, hf://datasets/USER/NAME one of data. `huggingface_hub` is imported when one is
named, and nothing is asked of a network before.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

from functa.storage.errors import DamagedObject, MissingObject, StorageError, TransientError, one_line
from functa.storage.functaset.records import vouch
from functa.storage.publish.manifest import MANIFEST, Manifest, parse_manifest, taken

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BATCH_FILES, BATCH_BYTES = 500, 256 << 20  # of a commit; what a batch holds is in memory

OWN = ".gitattributes"  # a file that the hub itself puts into every repository

ADDRESS = re.compile(r"hf://(?:(models|datasets)/)?([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]+))?")


@dataclass(frozen=True)
class HubAddress:
    """A repository by its name, of models or of data; kind None: the address leaves it open."""

    repo: str
    kind: Literal["model", "dataset"] | None = None
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo}{at}"

    @property
    def url(self) -> str:
        """Return the address of its page."""
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def of_kind(self, kind: Literal["model", "dataset"]) -> "HubAddress":
        """Return the address with its kind."""
        return replace(self, kind=kind)


def hub_address(text: str) -> HubAddress | None:
    """Return the repository that an address names, None for what is no hub's. Raises StorageError."""
    if not text.startswith("hf://"):
        return None
    found = ADDRESS.fullmatch(text.rstrip("/"))
    if found is None:
        raise StorageError(f"{text}: expected hf://USER/NAME or hf://datasets/USER/NAME, with @REVISION if you like")
    kinds: dict[str | None, Literal["model", "dataset"]] = {"models": "model", "datasets": "dataset"}
    return HubAddress(found[2], kinds.get(found[1]), found[3])


def check_writable(address: HubAddress) -> None:
    """Raise StorageError, before anything is read, where nothing could be uploaded: no token, an old revision."""
    from huggingface_hub import get_token

    if address.revision:
        raise StorageError(f"{address}: an export makes a new revision; leave @{address.revision} out")
    if get_token() is None:
        raise StorageError(f"{address}: needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


class HubTarget:
    """A repository that is new, empty or holds a part of the same export; with `replaces` any export.

    Files are committed by batches. The last commit has the manifest, so that a broken upload is no export, and the same
    command continues it.
    """

    def __init__(self, address: HubAddress, paths: list[str], private: bool = False, replaces: bool = False) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        self.address, self._repo, self._replaces = str(address), address, replaces
        self._api = _api()
        with _answers(address):
            where: dict[str, Any] = {"repo_id": address.repo, "repo_type": address.kind}
            everything: dict[str, Any] = {"recursive": True}
            try:
                info = self._api.repo_info(**where)  # answers at once where a listing tries again for half a minute
                listed = list(self._api.list_repo_tree(**where, **everything))
            except RepositoryNotFoundError:
                self._api.create_repo(**where, private=private or None)
                listed = []
        self._there = {each.path: each for each in listed if isinstance(each, RepoFile) and each.path != OWN}
        exported = MANIFEST in self._there
        foreign = self._there.keys() - {*paths, MANIFEST}
        if foreign and not (replaces and exported):
            raise taken(self.address, list(foreign), "is not of this export", replaceable=exported)
        before = self._before(info.sha) if foreign else None
        self._obsolete = [] if before is None else sorted(foreign & {*before.files, *before.cards})
        self._batch: dict[str, bytes] = {}
        self._number = 0

    def put(self, path: str, data: bytes) -> None:
        known = self._there.get(path)
        if known is not None:
            if _is_same(known, data):
                return
            if not self._replaces:
                raise taken(self.address, [path], "has another content", replaceable=MANIFEST in self._there)
        self._batch[path] = data
        if len(self._batch) >= BATCH_FILES or sum(map(len, self._batch.values())) >= BATCH_BYTES:
            self._commit(f"Add files, part {self._number + 1}")

    def finish(self, manifest: bytes, cards: Mapping[str, bytes]) -> None:
        for path, data in cards.items():
            known = self._there.get(path)
            if known is None or (self._replaces and not _is_same(known, data)):
                self._batch[path] = data  # else it may have been edited
        self.put(MANIFEST, manifest)
        if self._batch or self._obsolete:
            self._commit("Export", self._obsolete)

    def _before(self, revision: str | None) -> Manifest:
        """Return the manifest of the export that is to be replaced: what else lies there stays."""
        at = replace(self._repo, revision=revision)
        return parse_manifest(_downloaded(self._api, at, MANIFEST), f"{self.address}/{MANIFEST}")

    def _commit(self, message: str, obsolete: list[str] | None = None) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationAdd(path, data) for path, data in self._batch.items()]
        operations += [CommitOperationDelete(path, is_folder=False) for path in obsolete or ()]
        with _answers(self._repo):
            self._api.create_commit(self._repo.repo, operations, commit_message=message, repo_type=self._repo.kind)
        self._batch, self._number = {}, self._number + 1


def _is_same(known: Any, data: bytes) -> bool:
    """Return whether a file of a repository has these bytes: by its sha256, or by the id that git gives them."""
    if known.size != len(data):
        return False
    if known.lfs is not None:
        return bool(known.lfs.sha256 == vouch(data).sha256)
    return bool(known.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


@dataclass(frozen=True)
class HubExport:
    """An export in a repository, as of one revision."""

    address: HubAddress
    manifest: Manifest

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises DamagedObject where they are not those of the manifest."""
        data = _downloaded(_api(), self.address, path)
        record = self.manifest.files.get(path)
        if record is not None and vouch(data) != record:
            raise DamagedObject(
                f"{self.address}/{path}: is not what {MANIFEST} there describes; fetch another revision, or ask its "
                f"author to export it again"
            )
        return data


def open_hub(address: HubAddress) -> HubExport:
    """Find an export in a repository, at the newest revision or the one that is named. Raises StorageError."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = _api()
    kinds: tuple[Literal["model", "dataset"], ...] = ("model", "dataset") if address.kind is None else (address.kind,)
    for kind in kinds:
        with _answers(address):
            try:
                info = api.repo_info(address.repo, repo_type=kind, revision=address.revision)
            except RevisionNotFoundError:
                raise MissingObject(f"{address}: has no revision {address.revision}") from None
            except RepositoryNotFoundError:
                continue
        found = replace(address, kind=kind, revision=info.sha)
        data = _downloaded(api, found, MANIFEST)
        return HubExport(found, parse_manifest(data, f"{address}/{MANIFEST}"))
    what = {None: "model or data set", "model": "model", "dataset": "data set"}[address.kind]
    raise MissingObject(
        f"{address}: the hub has no {what} of that name, or it is private: check the name, or run `hf auth login`"
    )


def _downloaded(api: "HfApi", address: HubAddress, path: str) -> bytes:
    from huggingface_hub.errors import EntryNotFoundError

    with _answers(address), TemporaryDirectory(prefix="functa-fetch-") as folder:
        try:
            file = api.hf_hub_download(
                address.repo, path, repo_type=address.kind, revision=address.revision, local_dir=folder
            )
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # the hub did not answer, and no copy is in the cache
                raise TransientError(f"{address}: cannot reach the hub; {_FIX}") from None
            what = "is no export of functa" if path == MANIFEST else "is missing; ask its author to export it again"
            raise MissingObject(f"{address}/{path}: {what}") from None
        return Path(file).read_bytes()


def _api() -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]  # exports neither

    disable_progress_bars()
    logging.set_verbosity_error()  # its retries are no news; where they fail, the error is
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="functa")


_FIX = "check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if they are set"

STATUS = {
    401: "the hub does not accept the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token has no right to do that: use one with write access to this user or organisation",
    429: "the hub has had too many requests from here: try again later",
}


@contextmanager
def _answers(address: HubAddress) -> Iterator[None]:
    """Translate what the hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    of_client = cast(type[Exception], HfHubHTTPError.__bases__[0])  # its HTTP library's, where no answer comes
    try:
        yield
    except StorageError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = TransientError if status == 429 or status >= 500 else StorageError
        raise kind(f"{address}: {STATUS.get(status) or f'the hub answers {status}: {one_line(error)}'}") from None
    except (OfflineModeIsEnabled, of_client) as error:
        raise TransientError(f"{address}: cannot reach the hub ({one_line(error)}); {_FIX}") from None
    except (OSError, RuntimeError, ValueError) as error:  # of uploads, of metadata that the hub refuses
        raise StorageError(f"{address}: {one_line(error)}") from error
