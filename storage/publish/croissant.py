"""Croissant metadata of functasets and of latents in other formats: JSON-LD that data set searches and loaders read.

The vocabulary is that of https://docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from functa.storage.functaset.records import ObjectRecord

CROISSANT = "croissant.json"

PAPER = "https://arxiv.org/abs/2302.03130"

OF_CROISSANT = (
    "citeAs", "column", "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated",
    "replace", "samplingRate", "separator", "source", "subField", "transform", "equivalentProperty",
)  # fmt: skip

CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "sc": "https://schema.org/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"}, **{name: f"cr:{name}" for name in OF_CROISSANT},
}  # fmt: skip

COLUMNS = {
    "key": ("sc:Text", "The image's name in its source."),
    "label": ("sc:Integer", "The class's number, -1 for none."),
    "psnr": ("sc:Float", "PSNR in dB of the decoded image, before quantisation."),
    "augmentation": ("sc:Integer", "0 for the image itself, else the number of its changed copy."),
    "z": ("sc:Float", "The latent, flat."),
}


@dataclass(frozen=True)
class Described:
    """The facts of a data set that its metadata names."""

    name: str
    description: str
    licence: str
    version: int
    made: str
    url: str | None = None


def of_functasets(about: Described, roots: Mapping[str, ObjectRecord]) -> bytes:
    """Return the metadata of Zarr stores; `roots` are their root documents by their paths below croissant.json."""
    files: list[dict[str, Any]] = []
    for path, record in roots.items():
        folder = path.removesuffix("zarr.json")
        files += [_object(path, "application/json", record), _set(f"{folder}fragments", "application/vnd.zarr",
                                                                   f"{folder}fragments/**")]  # fmt: skip
    return _document(about, files, [])


def of_parquet(about: Described, splits: Iterable[str], shape: tuple[int, ...]) -> bytes:
    """Return the metadata of data/SPLIT-*.parquet, with a record set for each split."""
    names = list(splits)
    files = [_set(f"{name}-parquet", "application/x-parquet", f"data/{name}-*.parquet") for name in names]
    return _document(about, files, [_records(name, shape) for name in names])


def of_files(about: Described, splits: Iterable[str], media: str, pattern: str) -> bytes:
    """Return the metadata of files that no loader of Croissant reads; `pattern` has the split as {}."""
    return _document(about, [_set(f"{name}-files", media, pattern.format(name)) for name in splits], [])


def _document(about: Described, files: list[dict[str, Any]], records: list[dict[str, Any]]) -> bytes:
    document: dict[str, Any] = {
        "@context": CONTEXT, "@type": "sc:Dataset", "name": about.name, "description": about.description,
        "conformsTo": "http://mlcommons.org/croissant/1.0", "license": about.licence, "version": f"{about.version}.0.0",
        "datePublished": about.made, "citeAs": PAPER, "distribution": files, "recordSet": records,
    }  # fmt: skip
    if about.url:
        document["url"] = about.url
    return json.dumps(document, indent=1).encode() + b"\n"


def _object(path: str, media: str, record: ObjectRecord) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject", "@id": path, "name": path, "contentUrl": path, "encodingFormat": media,
        "contentSize": f"{record.bytes} B", "sha256": record.sha256,
    }  # fmt: skip


def _set(name: str, media: str, pattern: str) -> dict[str, Any]:
    return {"@type": "cr:FileSet", "@id": name, "name": name, "encodingFormat": media, "includes": pattern}


def _records(split: str, shape: tuple[int, ...]) -> dict[str, Any]:
    fields = []
    for column, (kind, description) in COLUMNS.items():
        source = {"fileSet": {"@id": f"{split}-parquet"}, "extract": {"column": column}}
        flat = {"repeated": True, "description": f"{description[:-1]}: {list(shape)}."} if column == "z" else {}
        fields.append({"@type": "cr:Field", "@id": f"{split}/{column}", "name": column, "dataType": kind,
                       "description": description, "source": source} | flat)  # fmt: skip
    return {"@type": "cr:RecordSet", "@id": split, "name": split, "field": fields}
