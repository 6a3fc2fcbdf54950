"""The memory that this process may still take: of the machine, of its control groups, and of its own limits."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")

MEMBERSHIP = Path("/proc/self/cgroup")

FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int:
    """Return the bytes that this process may still take; of what is limited several times, the least."""
    free = [int(psutil.virtual_memory().available), *_of_process()]
    for version, group in _groups():
        limit, usage, cached = FILES[version]
        try:
            allowed, used = (int(Path(group, name).read_text()) for name in (limit, usage))
            statistics = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
        free.append(allowed - used + int(statistics.get(cached, 0)))
    return max(0, min(free))


def _groups() -> Iterator[tuple[int, Path]]:
    """Yield version and folder of each control group that holds this process, with those that hold the group."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    # A container may see its own group as the root, or its path on the host, which leads nowhere.
    for line in ["0::/", "0:memory:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path(CONTROL_GROUPS, "memory") if controllers else CONTROL_GROUPS
        inner = Path(root, path.lstrip("/"))
        yield from ((1 if controllers else 2, group) for group in (inner, *inner.parents) if group.is_relative_to(root))


def _of_process() -> Iterator[int]:
    """Yield what the limits of the process (ulimit -v and -d) leave."""
    if not psutil.LINUX:
        return
    process = psutil.Process()
    used = process.memory_info()
    for limit, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        soft, _ = process.rlimit(limit)
        if soft not in (-1, psutil.RLIM_INFINITY):
            yield soft - taken
