"""Latents as WebDataset: SPLIT-*.tar, of each row NUMBER.z.npy, NUMBER.cls (its label) and NUMBER.json (the rest)."""

import io
import json
import tarfile
from functools import partial

import numpy as np

from functa.storage.functaset.functaset import Functaset
from functa.storage.publish.formats.parts import Part, parts


def webdataset_files(functaset: Functaset) -> dict[str, partial[bytes]]:
    """Return the files by their paths, each made when it is read."""
    return {
        f"{part.split}-{part.number:06d}.tar": partial(_file, part)
        for split in functaset.splits
        for part in parts(functaset, split)
    }


def _file(part: Part) -> bytes:
    rows, file = part.read(), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row, key in enumerate(rows.keys):
            array = io.BytesIO()
            np.save(array, rows.z[row], allow_pickle=False)
            about = {"key": key, "psnr": float(rows.psnr[row]), "augmentation": int(rows.augmentation[row])}
            members = {
                "z.npy": array.getvalue(),
                "cls": str(rows.labels[row]).encode(),
                "json": json.dumps(about).encode(),
            }
            for ending, data in members.items():  # an image's key may have dots, which would end a name here
                member = tarfile.TarInfo(f"{part.first + row:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()
