"""Ceph's programs from Debian's packages, unpacked into a folder of ours: nothing is installed, root is not needed.

python -m tests.helpers.storage.ceph_packages fetches them (60 MB) and prints where they lie.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).parents[3] / ".cache" / "ceph"
WANTED = ("radosgw", "ceph-mon", "ceph-osd")
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "osdmaptool", "radosgw", "radosgw-admin")
# What Ceph's packages want of a machine that keeps real disks; not linked into the programs above.
NEEDLESS = {
    "cryptsetup-bin", "dmeventd", "dmidecode", "gdisk", "hdparm", "liblvm2cmd2.03", "logrotate", "lvm2", "nvme-cli",
    "parted", "smartmontools", "sudo", "uuid-runtime", "xfsprogs",
}  # fmt: skip


class Unavailable(Exception):
    """Ceph is not available here; the message is one line that names what is missing."""


def unpacked(cache: Path = CACHE) -> Path:
    """Return the folder that replaces /, filled at the first call. Raises Unavailable."""
    for program in ("apt-get", "dpkg", "setpriv", "prlimit"):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is missing: the S3 tests unpack Ceph from Debian's packages (Debian 12)")
    root = cache / "root"
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _fetch(Path(folder))
            os.rename(Path(folder) / "root", root)
    _check_libraries(root)
    return root


def environment(root: Path) -> dict[str, str]:
    """Return the environment variables under which the unpacked programs find their libraries."""
    folders = [root / below for tail in ("", "/ceph") for below in (f"usr/lib/{triplet()}{tail}", f"lib/{triplet()}")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(str(folder) for folder in folders), "LC_ALL": "C"}


def triplet() -> str:
    """Return Debian's name for this kind of machine in library folders."""
    return f"{os.uname().machine}-linux-gnu"


def _fetch(folder: Path) -> None:
    """Download and unpack the packages that this machine lacks; apt's lists are in the folder, too."""
    for below in ("lists/partial", "apt/archives/partial", "debs", "root"):
        (folder / below).mkdir(parents=True)
    options = [
        f"-oDir::State::Lists={folder}/lists",
        f"-oDir::Cache={folder}/apt",  # else what an earlier --download-only left in apt's cache would be left out
        "-oAPT::Sandbox::User=root",
        "-oDebug::NoLocking=1",
    ]
    _run(["apt-get", *options, "-qq", "update"])
    plan = _run(["apt-get", *options, "-s", "--no-install-recommends", "install", *WANTED])
    names = {line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")}
    if missing := set(WANTED) - names - _installed():
        raise Unavailable(f"apt-get offers no {', '.join(sorted(missing))}: add Debian 12's main to its sources")
    wanted = sorted((names | set(WANTED)) - NEEDLESS)
    _run(["apt-get", *options, "-qq", "download", *wanted], cwd=folder / "debs")
    for package in sorted((folder / "debs").glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(folder / "root")])


def _installed() -> set[str]:
    done = subprocess.run(["dpkg-query", "-W", "-f", "${Package}\n", *WANTED], capture_output=True, text=True)
    return set(done.stdout.split())


def _check_libraries(root: Path) -> None:
    for program in PROGRAMS:
        path = root / "usr" / "bin" / program
        if not path.is_file():
            raise Unavailable(f"{path} is missing: remove {root} and run again")
        done = subprocess.run(["ldd", str(path)], env=environment(root), capture_output=True, text=True)
        missing = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("not found")]
        if missing:
            raise Unavailable(f"{program} lacks {', '.join(missing)}: remove {root} and run again, or install them")


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
    if done.returncode != 0:
        fault = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()[-1]
        raise Unavailable(f"{' '.join(word for word in command if not word.startswith('-o'))[:80]}: {fault}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(unpacked())
    except Unavailable as missing:
        sys.exit(f"ceph: {missing}")
