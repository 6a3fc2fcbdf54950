"""The root that version 0.1.0 wrote, and what its commands answered about it."""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "root-0.1.0.tar.xz"


def extract_old_root(folder: Path) -> Path:
    """Unpack `root/` and `expected/` into a folder; return it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
