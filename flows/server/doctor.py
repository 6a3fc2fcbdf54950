"""`functa doctor`: list what this machine has and what is missing, with the fix."""

import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import functa
from functa.flows.server.api import PORT, absolute, configured_api, healthy, password_fault, port_fault
from functa.flows.server.console import text_console
from functa.storage.errors import printable

PROJECT = Path(functa.__file__).parents[1]

LOCK = PROJECT / "requirements.lock"

NO_CHECKOUT = "installed as a package, without a checkout and its requirements.lock"

KEY_PACKAGES = (
    "torch", "torchvision", "numpy", "prefect", "fastapi", "zarr", "numcodecs", "pydantic", "cyclopts",
    "diffusers", "timm", "torchmetrics", "safetensors", "scikit-learn",
)  # fmt: skip

FREE_DISK = 2 << 30  # bytes

FREE_MEMORY = 2 << 30


@dataclass(frozen=True)
class Check:
    """One finding. ok: True fine, False to be fixed, None works without it."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def doctor(root: str = "functa-runs") -> list[Check]:
    """Run every check; none of them raises."""
    checks: list[Callable[[], Check]] = [
        check_python, check_torch, check_compiler, lambda: check_disk(root), check_memory,
        check_prefect, check_port, check_lock, check_versions,
    ]  # fmt: skip
    return [guarded(check) for check in checks]


def guarded(check: Callable[[], Check]) -> Check:
    """Run a check and report an exception as a finding: a broken installation is no traceback."""
    try:
        return check()
    except Exception as error:
        name = getattr(check, "__name__", "").removeprefix("check_").replace("<lambda>", "disk")
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}", "make install")


def check_python() -> Check:
    """Check that Python is at least 3.11."""
    version = platform.python_version()
    return Check(
        "python", sys.version_info >= (3, 11), f"{version} at {sys.executable}", "install Python 3.11 or later"
    )


def check_torch() -> Check:
    """Report torch's version and device."""
    import torch

    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} GPU: {torch.cuda.get_device_name(0)}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return Check("torch", True, f"{torch.__version__}, {device}")


def check_compiler() -> Check:
    """Check the tools of torch.compile, by the test that `compile: auto` uses itself."""
    from functa.models.compute.compilation import missing
    from functa.models.compute.device import choose_device

    lacking = missing(choose_device("auto"))
    if not lacking:
        return Check("compiler", True, "compiler and Python.h: inner.compile=auto may compile")
    detail = f"no {' and '.join(lacking)}: inner.compile=auto runs eagerly"
    return Check("compiler", None, detail, f"install {' and '.join(lacking.values())}")


def check_disk(root: str) -> Check:
    """Check that the root can be written to and, on this machine, the free space of its disk."""
    from functa.storage.errors import StorageError
    from functa.storage.places.address import open_location

    if root.startswith("s3://"):
        try:
            open_location(root).preflight_write()
        except StorageError as error:
            return Check("disk", False, str(error))
        return Check("disk", True, f"{root} can be written to")
    if "://" in root:
        return Check("disk", None, f"{root} is not on this machine")
    folder = Path(absolute(root))
    while not folder.exists():
        folder = folder.parent
    try:
        open_location(str(folder)).preflight_write()
    except StorageError as error:
        return Check("disk", False, str(error))
    free = shutil.disk_usage(folder).free
    return Check(
        "disk", free >= FREE_DISK, f"{gibibytes(free)} free at {folder}", "free space, or choose another --root"
    )


def check_memory() -> Check:
    """Check the memory available without swapping."""
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{gibibytes(memory.available)} of {gibibytes(memory.total)} available"
    return Check("memory", memory.available >= FREE_MEMORY, detail, "close other programs")


def check_prefect() -> Check:
    """Check the server that flows will report to."""
    api = configured_api()
    if not api:
        return Check("prefect", True, "no PREFECT_API_URL: functa run starts its embedded server")
    fix = "start it with `functa up`, or unset PREFECT_API_URL"
    if not healthy(api):
        return Check("prefect", False, f"{api} does not answer", fix)
    fault = password_fault(api)
    return Check("prefect", not fault, f"{api} {fault or 'answers'}")


def check_port() -> Check:
    """Check that the port of `functa up` is free; a server of this project on it is no fault."""
    fault = port_fault(PORT)
    ok = None if "Prefect" in fault else not fault
    return Check("port", ok, f"{PORT} {fault or 'is free'}", "functa up --port")


def check_lock() -> Check:
    """Look for the pins that the project was tested with; an installed wheel has none."""
    if LOCK.is_file():
        return Check("lock", True, str(LOCK))
    if (PROJECT / "pyproject.toml").is_file():
        return Check("lock", False, f"{LOCK} is missing", "git checkout requirements.lock")
    return Check("lock", None, NO_CHECKOUT)


def check_versions() -> Check:
    """Compare key packages with their pins, or with the package's own requirements where there is no lock."""
    if not LOCK.is_file():
        return _check_requirements()
    pins = read_pins(LOCK.read_text())
    differing = []
    for name in KEY_PACKAGES:
        version = metadata.version(name).split("+")[0]  # +cpu, +cu128
        if version not in pins.get(name, []):
            differing.append(f"{name} {version} (pinned: {' or '.join(pins.get(name, [])) or 'not at all'})")
    detail = ", ".join(differing) or f"{len(KEY_PACKAGES)} key packages are at their pins"
    return Check("versions", not differing, detail, "make install")


def _check_requirements() -> Check:
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("spatial-functa") or () if "extra ==" not in text]
    differing = [
        f"{each.name} {metadata.version(each.name)} (required: {each.specifier})"
        for each in wanted
        if not each.specifier.contains(metadata.version(each.name).split("+")[0], prereleases=True)
    ]
    detail = ", ".join(differing) or f"{len(wanted)} packages fit the requirements"
    return Check("versions", not differing, detail, "pip install --upgrade spatial-functa")


def read_pins(lock: str) -> dict[str, list[str]]:
    """Return the pinned versions by package, of the lines that apply to this platform."""
    from packaging.requirements import Requirement

    pins: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate():
                version = next(iter(requirement.specifier)).version.split("+")[0]
                pins.setdefault(requirement.name, []).append(version)
    return pins


def gibibytes(number: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{number / (1 << 30):.1f} GiB"


def print_checks(checks: list[Check], console: Console | None = None) -> None:
    """Print a table, with the fix below each finding that needs one."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = {True: Text("ok", "green"), False: Text("no", "red"), None: Text("--", "yellow")}[check.ok]
        lines = [check.detail] if check.ok or not check.fix else [check.detail, f"-> {check.fix}"]
        table.add_row(mark, check.name, Text("\n").join(Text(printable(line)) for line in lines))
    (console or text_console()).print(table)
