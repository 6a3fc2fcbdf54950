"""Latents as Parquet: data/SPLIT-*.parquet, each row's latent as a list of fixed length."""

import json
from functools import partial

from functa.storage.functaset.functaset import Functaset
from functa.storage.publish.formats.parts import Part, parts

ROWS = 4096  # of a row group


def parquet_files(functaset: Functaset) -> dict[str, partial[bytes]]:
    """Return the files by their paths, each made when it is read."""
    about = {"latent_shape": functaset.latent_shape, "content": functaset.content, "field": functaset.field_digest}
    metadata = {"functa": json.dumps(about)}
    return {
        f"data/{part.split}-{part.number:05d}-of-{part.count:05d}.parquet": partial(_file, part, metadata)
        for split in functaset.splits
        for part in parts(functaset, split)
    }


def _file(part: Part, metadata: dict[str, str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = part.read()
    numbers = rows.z[0].size
    columns = {
        "key": pa.array(rows.keys, pa.string()),
        "label": pa.array(rows.labels, pa.int32()),
        "psnr": pa.array(rows.psnr, pa.float32()),
        "augmentation": pa.array(rows.augmentation, pa.int32()),
        "z": pa.FixedSizeListArray.from_arrays(pa.array(rows.z.reshape(-1), pa.float32()), numbers),
    }
    table = pa.table(columns).replace_schema_metadata(metadata)
    file = pa.BufferOutputStream()
    pq.write_table(table, file, row_group_size=ROWS, compression="zstd")
    return bytes(file.getvalue())
