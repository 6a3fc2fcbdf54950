"""Put a file under its name, whole or not at all: temporary name, fsync, then a rename or, for create-only, a link.

Some file systems have no hard links: exFAT, shared folders of virtual machines, many FUSE mounts. There a rename that
replaces nothing does the same in one step. Where that is missing too, writers take turns by a lock on the folder, which
ends with its process. No way shows a file before it is whole.
"""

import ctypes
import errno
import fcntl
import os
import uuid
from contextlib import suppress
from pathlib import Path

from functa.storage.errors import StorageError
from functa.storage.places.location import PARTIAL

# What file systems, old kernels and containers report of a call that they do not have. The temporary file was just
# made in the same folder, so that it is not this user's rights that are missing.
NOT_THERE = frozenset(
    {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
)  # fmt: skip

AT_FDCWD, RENAME_NOREPLACE = -100, 1  # of Linux


def place(path: Path, data: bytes, replace: bool) -> bool:
    """Write the file; True if it was made, False if `replace` is not set and the name is taken. Raises OSError."""
    if not replace and path.exists():
        return False
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        elif not _name(temporary, path):
            return False
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def make_folder(folder: Path) -> None:
    """Like mkdir -p, each new name made durable in its parent. Raises StorageError where no folder can be made."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:  # its parent exists, so the file system takes no folders: /proc
        raise StorageError(f"{folder}: this folder cannot be created; choose another location") from None
    _sync_folder(folder.parent)


def _name(temporary: Path, path: Path) -> bool:
    """Give a whole file its name unless that is taken, by the first way that this file system has."""
    for way in (os.link, _rename_new, _rename_in_turn):
        try:
            way(temporary, path)
            return True
        except FileExistsError:
            with suppress(FileNotFoundError):  # a server whose answer was lost is asked twice, and had done it
                return temporary.samefile(path)
            return False
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
    raise StorageError(
        f"{path.parent}: this file system has neither hard links, nor renames that replace nothing, nor locks, one of "
        f"which keeps two writers from replacing each other's files; choose a location on another file system"
    )


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename unless the name is taken, in one step. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _rename_in_turn(temporary: Path, path: Path) -> None:
    """Rename unless the name is taken, while no other writer does the same in this folder. Raises OSError."""
    held = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.path.lexists(path):
            raise FileExistsError(path)
        os.replace(temporary, path)
    finally:
        os.close(held)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_THERE:  # some file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)
