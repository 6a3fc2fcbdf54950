"""The process that works on a stage: which one it is, and whether it still runs on this machine.

A wall clock can be set while a process runs, and a machine can get another host name. So a process is known by the
kernel's boot and by its start in clock ticks after it, where the system shows them.
"""

import os
import socket
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> str:
    """Return host/pid/start: a pid alone may be used again by another process."""
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid())}"


def host_of(owner: str) -> str:
    """Return the host name of an owner."""
    return owner.partition("/")[0]


def lives_here(owner: str) -> bool:
    """Return whether host/pid/start is a process that runs on this machine, whatever its host name is now."""
    host, _, rest = owner.partition("/")
    pid, _, start = rest.partition("/")
    if not pid.isdecimal() or (host != socket.gethostname() and not start.startswith(_boot())):
        return False
    import psutil

    try:
        if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return False
        # Older versions recorded the wall clock's seconds.
        return start in (_start(int(pid)), f"{psutil.Process(int(pid)).create_time():.2f}")
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False
    except (psutil.AccessDenied, PermissionError):
        return True  # of another user: it is there, and nothing more can be known


def _boot() -> str:
    return f"boot-{BOOT.read_text()[:8]}-" if BOOT.exists() else "boot-unknown-"


def _start(pid: int) -> str:
    if BOOT.exists():
        # Field 22, counted from after the name, which may hold blanks and brackets.
        return _boot() + Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    import psutil

    return f"{psutil.Process(pid).create_time():.2f}"
