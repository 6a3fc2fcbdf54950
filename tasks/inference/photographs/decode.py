"""Decode a store of photographs into PNG files, each at its own size or a multiple of it."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch

from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places.location import checked_key
from functa.tasks.inference.photographs.store import size_of
from functa.tasks.inference.png import prepare_folder, save_png
from functa.tasks.inference.ready.field import ReadyField, ready_field
from functa.tasks.inputs.pictures import as_uint8, to_picture
from functa.tasks.trained import field_of

Progress = Callable[[int, int], None]  # (images done, images in all)


def field_of_photographs(functaset: Functaset) -> ReadyField:
    """Return the field that a functaset of one size of images contains."""
    module, inner, patch = field_of(functaset)
    return ready_field(functaset.location.uri, module, inner, patch, functaset.field_digest)


def decode_photographs(uris: list[str], out: Path, scale: int = 1, progress: Progress = lambda done, of: None) -> int:
    """Write every image of these functasets as a PNG file named like its source; return how many.

    Names of folders are kept below `out`. Where two images differ in their endings alone, the second keeps its own.
    """
    functasets = [Functaset.open(uri) for uri in uris]
    total, done = sum(functaset.rows(split) for functaset in functasets for split in functaset.splits), 0
    if not total:
        raise StorageError(f"{uris[0] if uris else out}: has no images; encode some first")
    prepare_folder(out)
    written = set[str]()
    for functaset in functasets:
        size = size_of(functaset.fingerprint)
        assert size is not None  # of the kind that functasets_by_size names
        coder = field_of_photographs(functaset).coder()
        for shard in functaset.shards():
            table, rows = shard.table(), shard.rows
            latents = shard.fragment.dequantized(shard.array("z")[rows])
            for row, z in zip(rows.tolist(), latents, strict=True):
                image = as_uint8(coder.decode(torch.from_numpy(z)[None], size, scale))[0]
                path = out / _file_name(table.keys[row], written)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(to_picture(image), path)
                done += 1
                progress(done, total)
    return done


def _file_name(key: str, written: set[str]) -> str:
    """Return the name of an image's PNG file below the folder. Raises StorageError for a key that leaves it."""
    path = PurePosixPath(checked_key(key))
    name = str(path.with_suffix(".png"))
    if name in written:
        name = f"{path}.png"
    written.add(name)
    return name
