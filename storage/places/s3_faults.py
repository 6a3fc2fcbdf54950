"""The meaning of an S3 client's exceptions: one sentence, the fix, and whether a repetition may succeed.

s3fs turns several causes into the same PermissionError or FileNotFoundError; the server's own code is in the
exception that it was raised from. No text made here contains a secret, and of a key id only a part.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

# By class names up the inheritance: botocore and aiohttp have no common root, and need not be loaded for this.
LOST = {
    "HTTPClientError", "ClientPayloadError", "ClientConnectionError", "IncompleteReadError", "ResponseParserError",
    "ConnectionError",  # botocore's own, too: the endpoint refuses, as while its server is started again
}  # fmt: skip

# 503 and 500, as s3fs translates them, and the message of a broken socket.
LOST_ERRNO = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), errno.EPIPE, errno.ETIMEDOUT}

LOST_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")

REGION = ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's")

EXPIRED = ("the credentials have expired", "renew them, AWS_SESSION_TOKEN included")

DENIED = "key {key} may not {operation}"

BY_CODE = {
    "SignatureDoesNotMatch": ("the secret is not that of key {key}", "correct AWS_SECRET_ACCESS_KEY"),
    "InvalidAccessKeyId": ("key {key} is unknown there", "correct AWS_ACCESS_KEY_ID, or AWS_ENDPOINT_URL"),
    "NoSuchBucket": ("there is no bucket '{bucket}'", "create it, or correct the address"),
    "InvalidBucketName": ("'{bucket}' is no name of a bucket", "correct the address"),
    "AccessDenied": (DENIED, "grant it that right on bucket '{bucket}', or use another key"),
    "403": (DENIED, "grant it that right on bucket '{bucket}', or use another key"),
    "AllAccessDisabled": ("all access to bucket '{bucket}' is switched off", "ask its owner"),
    "RequestTimeTooSkewed": ("this machine's clock is not the server's", "set the clock"),
    "QuotaExceeded": ("the quota is used up", "free some space, then run the same command again"),
    "InsufficientStorage": ("the server's disks are full", "free some space, then run the same command again"),
    "PermanentRedirect": REGION,
    "301": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "ExpiredToken": EXPIRED,
    "InvalidToken": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
}


@dataclass(frozen=True)
class Account:
    """Whom and what a fault is about; nothing in it is secret."""

    bucket: str
    endpoint: str
    key: str  # masked

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.endpoint}, key {self.key}"


def account(bucket: str, endpoint: str | None = None, key: str | None = None) -> Account:
    """Return the account of a request; endpoint and key come from the environment unless the caller gives them."""
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return Account(bucket, _without_user(endpoint) or "the AWS default", masked(key or _configured_key()))


def endpoint_with_password() -> bool:
    """Return whether the environment's endpoint is of the form http://user:password@host."""
    return any("@" in os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))


def masked(key: str | None) -> str:
    """A key id as it may be shown: AKIA…XY12."""
    if not key:
        return "none"
    return f"{key[:4]}…{key[-4:]}" if len(key) >= 12 else f"{key[:2]}…"


def fault(error: BaseException, of: Account) -> str:
    """'what is wrong (bucket, endpoint, key); what to do', in one line."""
    what, fix = _meaning(error, of)
    return scrubbed(f"{what} ({of}); {fix}")


def code(error: BaseException) -> str:
    """The server's own word for the fault, such as NoSuchBucket; '' where it gave none."""
    for response in _responses(error):
        return str(response.get("Error", {}).get("Code", ""))
    return ""


def is_missing(error: BaseException) -> bool:
    """Return whether there is no such object, in a bucket that exists."""
    known = code(error)
    return known in ("NoSuchKey", "404") or (isinstance(error, FileNotFoundError) and known != "NoSuchBucket")


def operation(error: BaseException) -> str:
    """Return what was asked of the server, such as PutObject; '' where it did not answer."""
    return next((str(each.operation_name) for each in _chain(error) if hasattr(each, "operation_name")), "")


def may_pass(error: BaseException) -> bool:
    """Return whether the fault may pass: of the connection or the server's state, not of the request."""
    for response in _responses(error):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in LOST_STATUS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    names = _names(error)
    if "SSLError" in names:  # a certificate that does not hold will not hold in a second
        return False
    return bool(names & LOST) or (isinstance(error, OSError) and error.errno in LOST_ERRNO)


def scrubbed(text: str) -> str:
    """The text without the secrets of the environment and without passwords in addresses."""
    for secret in filter(None, (os.environ.get(name) for name in SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r"(://)[^/@\s]+@", r"\1", text)


def _meaning(error: BaseException, of: Account) -> tuple[str, str]:
    names, known = _names(error), code(error)
    if known in BY_CODE:
        words = {"key": of.key, "bucket": of.bucket, "operation": operation(error) or "do this"}
        what, fix = BY_CODE[known]
        return what.format(**words), fix.format(**words)
    if names & NO_CREDENTIALS:
        return "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if "SSLError" in names:
        fix = "http:// or https://, whichever the server uses, in AWS_ENDPOINT_URL"
        return f"TLS fails: {error}", f"{fix}; AWS_CA_BUNDLE for a certificate of your own"
    if names & {"EndpointConnectionError", "ConnectTimeoutError", "ConnectionError"}:
        return "the endpoint does not answer", "start it, look at the network, or correct AWS_ENDPOINT_URL"
    if isinstance(error, ValueError) and "endpoint" in str(error):
        return "the endpoint is no address", "set AWS_ENDPOINT_URL to http(s)://host:port"
    last = list(_chain(error))[-1]  # botocore's words: s3fs's translation may be a bare None
    return f"{type(last).__name__}: {last}", "check bucket, credentials and endpoint"


def _responses(error: BaseException) -> Iterator[dict]:
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's ClientError: the server answered
            yield response


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; not what merely happened to be handled meanwhile."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _without_user(endpoint: str | None) -> str:
    if not endpoint:
        return ""
    with suppress(ValueError):
        parts = urlsplit(endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return scrubbed(endpoint)


def _configured_key() -> str | None:
    """Return the key id of the environment or, where that has none, in the profile's file."""
    found = os.environ.get("AWS_ACCESS_KEY_ID")
    if found or not os.path.exists(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.expanduser("~/.aws"))):
        return found
    with suppress(Exception):  # this only completes a message about another fault
        import botocore.session

        credentials = botocore.session.get_session().get_credentials()
        return str(credentials.access_key) if credentials else None
    return None
