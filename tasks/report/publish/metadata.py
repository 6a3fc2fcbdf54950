"""Croissant metadata of the functasets in an export, or of their latents in another format."""

from datetime import UTC, datetime

from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import commit_key
from functa.storage.functaset.records import ObjectRecord
from functa.storage.publish.croissant import CROISSANT, Described, of_files, of_functasets, of_parquet
from functa.tasks.report.publish.cards import About
from functa.tasks.report.publish.contents import Contents

FILES = {
    "webdataset": ("application/x-tar", "{}-*.tar"),
    "datasets": ("application/vnd.apache.arrow.file", "{}/*.arrow"),
}


def metadata(about: About, contents: Contents, url: str | None) -> dict[str, bytes]:
    """Return croissant.json by its path: one for each data card."""
    opened = {name: Functaset.open(place) for name, place in contents.functasets.items()}
    if contents.kind == "root":
        return {
            f"{name}/{CROISSANT}": of_functasets(_described(about, [found], url), _roots({"": found}))
            for name, found in opened.items()
        }
    described = _described(about, list(opened.values()), url)
    if contents.layout == "zarr":
        return {CROISSANT: of_functasets(described, _roots(opened))}
    (found,) = opened.values()
    if contents.layout == "parquet":
        return {CROISSANT: of_parquet(described, found.splits, found.latent_shape)}
    return {CROISSANT: of_files(described, found.splits, *FILES[contents.layout])}


def _roots(opened: dict[str, Functaset]) -> dict[str, ObjectRecord]:
    return {f"{name}/zarr.json".lstrip("/"): found.commit.objects["zarr.json"] for name, found in opened.items()}


def _described(about: About, found: list[Functaset], url: str | None) -> Described:
    rows = sum(each.rows(split) for each in found for split in each.splits)
    licence = about.licence if about.licence == "other" else f"https://spdx.org/licenses/{about.licence}"
    words = f"{rows:,} images as latents of a neural field (spatial functa)."
    version = found[0].version if len(found) == 1 else 1
    return Described(about.name, words, licence, version, min(_made(each) for each in found), url)


def _made(found: Functaset) -> str:
    """Return the day of the newest commit."""
    entry = found.location.entry(commit_key(found.version))
    assert entry is not None
    return datetime.fromtimestamp(entry.modified, UTC).strftime("%Y-%m-%d")
