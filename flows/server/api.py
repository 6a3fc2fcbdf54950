"""Prefect's server: its address and the settings it is started with. Imports neither prefect nor torch."""

import base64
import http.client
import os
import secrets
import socket
import ssl
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from functa.storage.errors import FunctaError

HOST = "127.0.0.1"

LOOPBACK = (HOST, "localhost", "::1")

PORT = 4200

STARTUP_SECONDS = 120

PASSWORD = "PREFECT_API_AUTH_STRING"  # noqa: S105  the variable's name: what clients send, NAME:PASSWORD

SERVER_PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # noqa: S105  what the server demands

POOL = "functa"  # of deploy/prefect.yaml, as the queues

QUEUES = ("cpu", "gpu")

WAITING_QUEUE = "cpu"  # of runs that wait for other runs

GPU_LIMIT = "functa-gpu"  # concurrency limit with a slot for each device

# Set unless the user did: no telemetry, no advertisement, patience with a slow machine, workers that poll more often.
MANNERS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}",  # no page of another origin may read its answers
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the automation that finds dead runs waits for three of them
    # Slots outlive a restart of the server: leases in its memory would be lost, their slots held for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


class OperateError(FunctaError):
    """A fault outside the program: a taken port, no server, a child process that ended."""


def prepare_environment() -> None:
    """Set Prefect's settings before it is imported, except those that the user set in environment or profile."""
    os.environ["PREFECT_HOME"] = str(prefect_home())
    _leave_loopback_out_of_proxies()
    profile = active_profile()
    settings = dict(MANNERS)
    api = configured_api()
    if not api:
        settings["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "true"  # the embedded server
    elif password := password_of(api):
        settings[PASSWORD] = password
    for name, value in settings.items():
        if name not in profile:
            os.environ.setdefault(name, value)


def prefect_home() -> Path:
    """Return Prefect's folder: its database, its profiles and our logs.

    It is this project's own unless the user names one: a newer Prefect of another project would migrate a shared
    database, which the one of this project then cannot read.
    """
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get("PREFECT_HOME") or f"{data}/functa/prefect").expanduser()


def check_home() -> None:
    """Raise OperateError where Prefect's folder cannot be written: its server would not start, and give no reason."""
    home = prefect_home()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)  # its database and logs are the user's own
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise OperateError(
            f"{home}: cannot be written ({error.strerror or error}), and Prefect keeps its database there; set "
            f"PREFECT_HOME to a folder that can"
        ) from None


def _leave_loopback_out_of_proxies() -> None:
    """Let no proxy of the environment be asked for this machine's own addresses."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    proxies = [name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
    if proxies and listed.strip() != "*":
        hosts = [host.strip() for host in listed.split(",") if host.strip()]
        both = ",".join(dict.fromkeys([*hosts, HOST, "localhost", "::1"]))
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = both  # libraries read one or the other


def note_on_profile() -> str:
    """Return a note where a profile outside this project's Prefect folder names a server, which is not used."""
    usual = Path("~/.prefect").expanduser()
    named = "" if usual == prefect_home() else active_profile(usual).get("PREFECT_API_URL", "")
    return f"the Prefect profile in {usual} names a server; to use it set PREFECT_API_URL={named}" if named else ""


def active_profile(home: Path | None = None) -> dict[str, str]:
    """Return the settings of the user's active Prefect profile; empty if none can be read."""
    try:
        profiles = tomllib.loads(((home or prefect_home()) / "profiles.toml").read_text())
        name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
        return {str(key): str(value) for key, value in profiles.get("profiles", {}).get(name, {}).items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError):
        return {}


def absolute(root: str) -> str:
    """Return a URI unchanged, and a path as absolute, so that it means the same to a worker in another folder."""
    return root if "://" in root else str(Path(root).expanduser().absolute())


def configured_api() -> str:
    """Return PREFECT_API_URL from environment or profile, or an empty string."""
    return (os.environ.get("PREFECT_API_URL") or active_profile().get("PREFECT_API_URL", "")).rstrip("/")


def local_api(port: int) -> str:
    """Return the address of the API that `functa up` serves."""
    return f"http://{HOST}:{port}/api"


def fetch(address: str, timeout: float = 3.0, password: str = "") -> bytes:
    """Return a page's body. Raises OSError or ValueError if there is none."""
    # A proxy from the environment is never asked for this machine's own addresses.
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if _is_loopback(address) else []))
    opener.addheaders = [("Authorization", basic(password))] if password else []
    with opener.open(address, timeout=timeout) as answer:
        return bytes(answer.read())


def _is_loopback(address: str) -> bool:
    return urlsplit(address).hostname in LOOPBACK


def basic(password: str) -> str:
    """Return the value of the header Authorization for NAME:PASSWORD."""
    return f"Basic {base64.b64encode(password.encode()).decode()}"


def new_password() -> str:
    """Return a random password for a server, with the name before it that Prefect's clients expect."""
    return f"functa:{secrets.token_urlsafe(32)}"


def password_file(port: int) -> Path:
    """Return the file with the password of the `functa up` on this port; only its user can read it."""
    return prefect_home() / "functa" / f"password-{port}"


def write_private(file: Path, text: str) -> None:
    """Write a file that only this user can read, in place of one that may have another owner or mode."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)


@contextmanager
def kept_password(port: int, password: str) -> Iterator[None]:
    """Keep the password in its file, where the user's other commands find it, as long as the server runs."""
    file = password_file(port)
    write_private(file, password)
    try:
        yield
    finally:
        with suppress(OSError):  # another one's, which has taken the port at the same moment, stays
            if file.read_text() == password:
                for each in (file, file.with_suffix(".html")):
                    each.unlink(missing_ok=True)


def password_of(api: str) -> str:
    """Return the password for this API; empty where there is none.

    For a server that the user named it is the user's; else that of this user's `functa up` there.
    """
    chosen = os.environ.get(PASSWORD) or active_profile().get(PASSWORD, "")
    kept = ""
    with suppress(OSError, ValueError):
        if _is_loopback(api):
            kept = password_file(urlsplit(api).port or 80).read_text()
    return (chosen or kept) if api == configured_api() else kept  # the user's is for the server that the user named


@contextmanager
def using(api: str, password: str = "") -> Iterator[None]:
    """Let Prefect's clients in this process use this server, with its password."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    password = password or password_of(api)
    with temporary_settings({PREFECT_API_URL: api} | ({PREFECT_API_AUTH_STRING: password} if password else {})):
        yield


def healthy(api: str) -> bool:
    """Return whether a Prefect server answers at this API address. None asks for a password for this."""
    try:
        return fetch(f"{api}/health").strip() == b"true"
    except (OSError, ValueError, http.client.HTTPException):
        return False


def password_fault(api: str) -> str:
    """Return why the server refuses the password that this command has; empty if it does not."""
    password = password_of(api)
    try:
        fetch(f"{api}/admin/version", timeout=10, password=password)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            fault = f"refuses the password of {PASSWORD}" if password else "asks for a password"
            return f"{fault}: set {PASSWORD} to the server's, or be the user who started `functa up`"
    except (OSError, ValueError, http.client.HTTPException):
        pass  # whoever uses it next reports that
    return ""


def check_api() -> None:
    """Raise OperateError where the server that the user named does not answer at all."""
    api = configured_api()
    if not api:
        return
    try:
        fetch(f"{api}/health", timeout=10)
        if fault := password_fault(api):
            raise OperateError(f"{api} {fault}")
    except urllib.error.HTTPError:
        return  # somebody answers, and Prefect reports what is wrong
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLError):
            return  # somebody answers; which certificates are trusted is a setting of Prefect's
        raise OperateError(
            f"PREFECT_API_URL={api}: no Prefect server answers there ({reason}); start it, or unset PREFECT_API_URL to "
            f"run without one"
        ) from None


def port_fault(port: int) -> str:
    """Return why the port cannot be served on this machine; empty if it can."""
    if not 0 < port < 65536:
        return "is no port: 1 to 65535 are"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except PermissionError:
            return "may only be opened by root"
        except OSError:
            return "is taken by a Prefect server" if healthy(local_api(port)) else "is taken by another program"
    return ""
