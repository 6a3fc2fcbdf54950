"""Small objects by obstore, in a tenth of the processor time that botocore takes for each.

Only a whole answer counts. obstore reports a fault as text, and it has rules of its own for credentials, certificates
and regions: whatever it does not read, botocore is asked for again, whose exceptions are known. It lists nothing: an
error in an answer of status 200, or a proxy's page, is an empty listing to it.
"""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

Header = dict[str, Any]  # ContentLength (of the whole object), ETag, LastModified

Span = tuple[int, int]  # first byte, and the one after the last

FAULTS, PAUSE_SECONDS = 8, 60.0  # after so many in a row it is not used for that long

LONGEST = {"connect_timeout": "10s", "timeout": "30s"}

_USED_IN: list[int] = []  # the process that started obstore's threads, which a fork does not have


class FastReads:
    """Reads of one process with the settings and credentials of a client of botocore."""

    def __init__(self, session: Any, client: Any) -> None:
        self._credentials, self._client = session and session.get_credentials(), client
        self._stores: dict[str, Any] = {}  # by bucket
        own_authority = (
            session and session.get_config_variable("ca_bundle") and client.meta.endpoint_url.startswith("https")
        )
        style = dict(client.meta.config.s3 or {})
        plain = style.pop("addressing_style", "auto") in ("auto", "path") and not style
        self._usable = bool(plain and self._credentials and not own_authority)
        self._faults, self._not_before = 0, 0.0

    def get(self, bucket: str, key: str, limit: int | None, span: Span | None) -> tuple[Header, bytes] | None:
        """Return the header and the bytes of an object, or of a span of it; None where botocore has to be asked.

        The bytes are left out if there are more than `limit`.
        """
        here = threading.current_thread() is not threading.main_thread()  # there Ctrl-C would not end the wait
        if not (self._usable and here and time.monotonic() >= self._not_before and _is_own()):
            return None
        try:
            found = self._store(bucket).get(key, options={} if span is None else {"range": span})
            header = {
                "ContentLength": found.meta["size"], "ETag": found.meta["e_tag"],
                "LastModified": found.meta["last_modified"],
            }  # fmt: skip
            if limit is not None and header["ContentLength"] > limit:
                return header, b""
            data, (start, end) = bytes(found.bytes()), found.range
            whole = len(data) == end - start and header["ETag"]
        except Exception:  # whatever it is, botocore will name it
            whole = False
        self._faults = 0 if whole else self._faults + 1
        if self._faults >= FAULTS:
            self._faults, self._not_before = 0, time.monotonic() + PAUSE_SECONDS
        return (header, data) if whole else None

    def _store(self, bucket: str) -> Any:
        if bucket not in self._stores:
            from obstore.store import S3Store

            meta = self._client.meta
            region = meta.region_name if meta.region_name not in (None, "aws-global") else "us-east-1"
            options: Any = LONGEST | {"allow_http": meta.endpoint_url.startswith("http://")}
            self._stores[bucket] = S3Store(
                bucket, endpoint=meta.endpoint_url, region=region, credential_provider=self._current_credentials,
                client_options=options, retry_config={"max_retries": 0},
            )  # fmt: skip
        return self._stores[bucket]

    def _current_credentials(self) -> Any:
        """Return what botocore has, which renews its own; asked again within minutes."""
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key, "secret_access_key": now.secret_key, "token": now.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }  # fmt: skip


def _is_own() -> bool:
    """Return whether this process may use obstore: no process that it was forked from has used it."""
    if not _USED_IN:
        _USED_IN.append(os.getpid())
    return _USED_IN[0] == os.getpid()
