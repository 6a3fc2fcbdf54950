"""Requests that read and list a bucket, made in the calling thread: one for each object, in a part of s3fs's time.

s3fs hands every request to an event loop, keeps a client for each thread, and asks for an object's size before it reads
it; and botocore's own parser takes 100 µs for each object of a listing, most of them for its date. The settings are
those of s3fs, which writes, and so are the exceptions: botocore's.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from functa.storage.places.s3_fast import FastReads, Header, Span


@dataclass(frozen=True)
class Page:
    """A part of a listing, a column for each fact; token: of the next page, None after the last one."""

    keys: list[str]
    etags: list[str]
    sizes: list[int]
    modified: list[str]  # ISO 8601
    token: str | None


@dataclass(frozen=True)
class Reader:
    """Reads buckets; one for a process and all its threads."""

    client: Any
    fast: FastReads

    def get(self, bucket: str, key: str, limit: int | None = None, span: Span | None = None) -> tuple[Header, bytes]:
        """Return the header and the bytes of an object, or those of a span; none where there are more than `limit`.

        Behind an object's end lie none, and then the header is empty.
        """
        from botocore.exceptions import ClientError

        how = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        try:
            header = self.client.get_object(Bucket=bucket, Key=key, **how)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                return {}, b""
            raise
        try:
            return _whole(header, limit, span)
        finally:
            header["Body"].close()

    def page(self, bucket: str, prefix: str, token: str | None) -> Page:
        """Return up to a thousand objects whose keys start with the prefix, from the mark of a page on."""
        mark = {} if token is None else {"ContinuationToken": token}
        found: Page = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix, **mark)["Page"]
        return found


def _whole(header: Header, limit: int | None, span: Span | None) -> tuple[Header, bytes]:
    """Return the header with the object's own size, and the bytes. Raises what botocore does where some are missing."""
    from botocore.parsers import ResponseParserError

    if "ContentLength" not in header and "transfer-encoding" not in header["ResponseMetadata"]["HTTPHeaders"]:
        raise ResponseParserError("the answer ends in its header")  # which Python's parser takes for an empty object
    size = header.get("ContentRange", "").rpartition("/")[2] or header.get("ContentLength")
    if limit is not None and size is not None and int(size) > limit:
        return header | {"ContentLength": int(size)}, b""
    data: bytes = header["Body"].read()
    header = header | {"ContentLength": len(data) if size is None else int(size)}
    if span is not None and "ContentRange" not in header:  # from a server that knows no spans
        data = data[slice(*span)]
    return header, data


_READERS: dict[int, Reader] = {}  # by process: a fork must not use the connections of its parent


def reader_like(system: Callable[[], Any]) -> Reader:
    """Return the reader of this process, with the settings of s3fs's file system, which is opened for it."""
    process = os.getpid()
    if process not in _READERS:
        _READERS.setdefault(process, _reader(system()))
    return _READERS[process]


def forget_readers() -> None:
    """Let the next request look at the environment again."""
    _READERS.clear()


def _reader(system: Any) -> Reader:
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.session import Session

    session, config = Session(**system.kwargs), dict(system.config_kwargs)
    if system.anon:
        config["signature_version"] = UNSIGNED
    elif system.key:
        session.set_credentials(system.key, system.secret, system.token)
    given = {"use_ssl": system.use_ssl, "endpoint_url": system.endpoint_url} | system.client_kwargs
    client = session.create_client("s3", config=Config(**config), **given)
    client.meta.events.register("before-parse.s3.ListObjectsV2", _parse_page)
    return Reader(client, FastReads(None if system.anon else session, client))


def _parse_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the answer to a listing from botocore before its parser does."""
    if response_dict["status_code"] < 300:  # else it is an error, which the parser knows
        customized_response_dict["Page"] = page_of(response_dict["body"])
        response_dict["body"] = b"<ListBucketResult/>"


def page_of(answer: bytes) -> Page:
    """Return the page that the XML of a listing holds. Raises ResponseParserError for anything else."""
    from botocore.parsers import ResponseParserError

    root = None
    with suppress(ElementTree.ParseError):
        root = ElementTree.fromstring(answer)  # noqa: S314  as botocore does
    if root is None or not root.tag.endswith("ListBucketResult"):
        raise ResponseParserError(f"the answer to a listing is none, {len(answer)} bytes: {answer[:80]!r}")
    space = root.tag.removesuffix("ListBucketResult")
    objects = root.findall(f"{space}Contents")

    def column(name: str) -> list[str]:
        tag = space + name
        return [each.findtext(tag) or "" for each in objects]

    keys, sizes = column("Key"), column("Size")
    token = root.findtext(f"{space}NextContinuationToken")
    truncated = root.findtext(f"{space}IsTruncated") == "true"
    if (truncated and not token) or not all(keys) or not all(map(str.isdecimal, sizes)):
        raise ResponseParserError("a listing without the mark of its next page, or of objects without key or size")
    if root.findtext(f"{space}EncodingType") == "url":
        keys = [unquote(key) if "%" in key else key for key in keys]
    etags = [etag.strip('"') for etag in column("ETag")]
    return Page(keys, etags, [int(size) for size in sizes], column("LastModified"), token if truncated else None)
