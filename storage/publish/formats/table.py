"""The formats that latents are exported in, and what each needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.publish.formats.arrow import datasets_files
from functa.storage.publish.formats.parquet import parquet_files
from functa.storage.publish.formats.webdataset import webdataset_files
from functa.storage.publish.manifest import Layout

Files = dict[str, Callable[[], bytes]]


@dataclass(frozen=True)
class Format:
    """A format: its files of a functaset, with a folder for what is temporary, and the package that writes them."""

    files: Callable[[Functaset, Path], Files]
    package: str = ""
    extra: str = ""


FORMATS: dict[Layout, Format] = {
    "parquet": Format(lambda functaset, _: {**parquet_files(functaset)}, "pyarrow", "parquet"),
    "webdataset": Format(lambda functaset, _: {**webdataset_files(functaset)}),
    "datasets": Format(lambda functaset, folder: {**datasets_files(functaset, folder)}, "datasets", "datasets"),
}


def check_installed(name: Layout) -> None:
    """Raise StorageError, naming the extra, for a format whose package is not installed."""
    needed = FORMATS[name]
    if needed.package and find_spec(needed.package) is None:
        raise StorageError(f"--format {name} needs {needed.package}: pip install 'spatial-functa[{needed.extra}]'")


@contextmanager
def files_in_format(functaset: Functaset, name: Layout) -> Iterator[Files]:
    """Give a functaset's files in a format, until the block ends. Raises StorageError as check_installed does."""
    check_installed(name)
    with TemporaryDirectory(prefix="functa-export-") as folder:
        yield FORMATS[name].files(functaset, Path(folder))
