"""A worker reads and writes only where its operator allows it, whatever links, '..' and similar names a path has."""

import os
from pathlib import Path

import pytest

from functa.storage.config import ImagesConfig
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from functa.storage.places.address import open_location
from functa.storage.places.allowed import ALLOWED_ROOTS, LocationNotAllowed, joined_places, read_places

pytestmark = pytest.mark.attacks


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder that is allowed, beside a bucket's prefix; another one is a link to it."""
    folder = tmp_path / "allowed, with a comma"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "way-out").symlink_to(tmp_path / "outside")
    monkeypatch.setenv(ALLOWED_ROOTS, joined_places([str(tmp_path / "link"), "s3://bucket/runs/"]))
    return folder


def test_without_the_variable_every_location_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.setenv(ALLOWED_ROOTS, value) if value is not None else monkeypatch.delenv(ALLOWED_ROOTS, False)
        assert open_location(str(tmp_path)).uri == str(tmp_path)


@pytest.mark.parametrize("path", ["", "inside", "new/one", "inside/../inside", "../link/inside"])
def test_what_lies_in_an_allowed_folder_is_opened(allowed: Path, path: str) -> None:
    for kind in ("", "file://"):
        assert open_location(f"{kind}{allowed}/{path}")


def test_what_lies_below_an_allowed_prefix_is_opened(allowed: Path) -> None:
    for uri in ("s3://bucket/runs", "s3://bucket/runs/", "s3://bucket/runs/digits/a"):
        assert open_location(uri)


OUTSIDE = ["..", "../outside", "way-out", "way-out/new", "../allowed, with a comma2", "../allowed", "inside/../.."]


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_lies_outside_is_refused_in_one_line_with_the_fix(allowed: Path, path: str) -> None:
    for kind in ("", "file://"):
        with pytest.raises(LocationNotAllowed, match=f"is in none of the locations that {ALLOWED_ROOTS}") as caught:
            open_location(f"{kind}{allowed}/{path}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["/", "/etc", "~", "s3://bucket", "s3://bucket/runs2", "s3://other/runs", "s3://bucket/run", "s3://runs/runs"],
)
def test_other_places_are_refused(allowed: Path, uri: str) -> None:
    with pytest.raises(LocationNotAllowed):
        open_location(uri)
    with pytest.raises(StorageError):
        open_location("s3://bucket/runs/../secret")


@pytest.mark.parametrize("source", ["folder", "npz", "torchvision"])
def test_images_of_every_source_are_read_from_allowed_places_alone(allowed: Path, source: str) -> None:
    for location in (f"{allowed}/../outside", f"file://{allowed}/way-out", os.path.relpath(allowed.parent / "outside")):
        with pytest.raises(LocationNotAllowed):
            open_images(ImagesConfig(source=source, location=location))


def test_fid_weights_are_read_from_allowed_places_alone(allowed: Path) -> None:
    from functa.tasks.evaluation.config import FidConfig
    from functa.tasks.evaluation.generation.inception import weights_digest

    (allowed.parent / "outside" / "weights.pth").write_bytes(b"x")
    with pytest.raises(LocationNotAllowed):
        weights_digest(FidConfig(weights=f"{allowed}/way-out/weights.pth", any_weights=True))


def test_a_list_of_places_is_read_as_it_was_written() -> None:
    places = ["/a b", "/a,b", "s3://bucket/x"]
    assert read_places(joined_places(places)) == places
    assert read_places("/a , /b,") == ["/a", "/b"]
