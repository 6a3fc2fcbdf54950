"""Latents as the `datasets` library saves them to disk: Arrow files, read by load_from_disk."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from functa.storage.functaset.functaset import Functaset
from functa.storage.publish.formats.parts import Part, parts


def datasets_files(functaset: Functaset, folder: Path) -> dict[str, partial[bytes]]:
    """Return the files by their paths, after the library has written them below a folder."""
    from datasets import Array3D, Dataset, DatasetDict, Features, Value, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    features = Features(
        {"key": Value("string"), "label": Value("int32"), "psnr": Value("float32"), "augmentation": Value("int32"),
         "z": Array3D(functaset.latent_shape, "float32")}
    )  # fmt: skip
    by_split = {split: parts(functaset, split) for split in functaset.splits}
    try:
        made = {
            split: Dataset.from_generator(
                _rows, features, str(folder / "cache"), gen_kwargs={"read": found}, split=split,
                fingerprint=f"{functaset.content}-{split}",
            )
            for split, found in by_split.items() if found
        }  # fmt: skip
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    saved = folder / "saved"
    DatasetDict(made).save_to_disk(saved, num_shards={split: len(by_split[split]) for split in made})
    paths = sorted(path for path in saved.rglob("*") if path.is_file())
    return {path.relative_to(saved).as_posix(): partial(path.read_bytes) for path in paths}


def _rows(read: list[Part]) -> Iterator[dict[str, Any]]:
    for part in read:
        rows = part.read()
        for row, key in enumerate(rows.keys):
            yield {
                "key": key, "label": int(rows.labels[row]), "psnr": float(rows.psnr[row]),
                "augmentation": int(rows.augmentation[row]), "z": rows.z[row],
            }  # fmt: skip
