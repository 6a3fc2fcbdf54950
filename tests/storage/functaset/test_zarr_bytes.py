"""Shards as bytes: the same that zarr writes, and rows found by the shard's own index."""

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from functa.storage.functaset.zarr_bytes import (
    ArraySpec,
    chunk_key,
    chunk_offsets,
    decode,
    decode_vouched,
    encode,
    new_document,
    shard_slice,
)


def zarrs_own(document: bytes, spec: ArraySpec, block: np.ndarray, shard: int) -> bytes:
    """The shard's object as zarr writes it."""
    store = MemoryStore({"zarr.json": cpu.Buffer.from_bytes(document)})
    array = zarr.open_array(store, mode="r+").with_config({"write_empty_chunks": True})
    array[shard_slice(spec, shard)] = block
    return store._store_dict[chunk_key(spec, shard)].to_bytes()


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 30), chunk=st.integers(1, 6), chunks=st.integers(1, 4), seed=st.integers(0, 9))
def test_chunks_of_a_raw_shard_are_found_by_its_own_index(rows: int, chunk: int, chunks: int, seed: int) -> None:
    spec = ArraySpec((rows, 2, 3), "float32", chunk * chunks, chunk)
    document = new_document(spec)
    shard = seed % -(-rows // spec.shard_rows)
    size = min(spec.shard_rows, rows - shard * spec.shard_rows)
    block = np.random.default_rng(seed).normal(size=(size, 2, 3)).astype(np.float32)
    data = encode(document, spec, block, shard)[1]
    assert data == zarrs_own(document, spec, block, shard)
    np.testing.assert_array_equal(decode_vouched(document, spec, data, shard), block)
    offsets = chunk_offsets(document, spec, np.frombuffer(data, np.uint8), shard)
    assert offsets is not None
    found = [np.frombuffer(data, np.float32, 6, offsets[r // chunk] + r % chunk * 24) for r in range(size)]
    np.testing.assert_array_equal(np.stack(found).reshape(-1, 2, 3), decode(document, spec, data, shard))
    compressed = ArraySpec((rows, 2, 3), "float32", chunk * chunks, chunk, "zstd")
    assert chunk_offsets(new_document(compressed), compressed, np.frombuffer(data, np.uint8), shard) is None
