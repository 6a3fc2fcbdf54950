"""Shards as bytes: the same that zarr writes, and rows found by the shard's own index."""

import resource

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from functa.storage.errors import DamagedObject
from functa.storage.functaset.zarr_bytes import (
    ArraySpec,
    check_document,
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


def bomb(codec: str, declared: int) -> bytes:
    """The beginning of a compressed chunk that declares so many bytes."""
    if codec == "zstd":  # one segment, with eight bytes for its size, then a block of one byte many times over
        return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + declared.to_bytes(8, "little") + b"\x03\x00\x10\x00" * 9
    return bytes([2, 1, 0x21, 1]) + (declared % (1 << 32)).to_bytes(4, "little") + bytes(40)


@pytest.mark.attacks
@pytest.mark.parametrize("declared", [0, 47, 49, (1 << 31) - 1, 1 << 40])
@pytest.mark.parametrize("codec", ["zstd", "exact"])
def test_a_chunk_that_declares_another_size_is_refused_before_memory_is_taken(codec: str, declared: int) -> None:
    spec = ArraySpec((8, 2, 3), "uint8", 8, 8, codec)  # type: ignore[arg-type]
    chunk = bomb(codec, declared)
    index = np.array([0, len(chunk)], "<u8").tobytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedObject, match=r"declares|does not decode"):
        decode(new_document(spec), spec, chunk + index + bytes(4))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


@pytest.mark.attacks
@pytest.mark.parametrize("entry", [(1 << 63, 1 << 63), (0, 10_000), (5, 1 << 64 - 1)])
def test_a_shard_whose_index_leads_out_of_it_is_refused(entry: tuple[int, int]) -> None:
    spec = ArraySpec((8, 2, 3), "uint8", 8, 8, "zstd")
    with pytest.raises(DamagedObject, match=r"leads out|shorter"):
        decode(new_document(spec), spec, bytes(100) + np.array(entry, "<u8").tobytes() + bytes(4))
    with pytest.raises(DamagedObject, match="shorter"):
        decode(new_document(spec), spec, bytes(7))


@pytest.mark.parametrize("codec", ["raw", "zstd", "exact"])
@pytest.mark.parametrize("seed", range(3))
def test_compressed_shards_are_read_back(codec: str, seed: int) -> None:
    rows, chunk = (5, 37, 600)[seed], (2, 8, 300)[seed]
    spec = ArraySpec((rows, 4, 4, 8), "uint8", 2 * chunk, chunk, codec)  # type: ignore[arg-type]
    block = np.random.default_rng(seed).integers(0, 4 if seed else 256, (min(rows, 2 * chunk), 4, 4, 8), np.uint8)
    document = new_document(spec)
    check_document(document, spec)
    np.testing.assert_array_equal(decode(document, spec, encode(document, spec, block)[1]), block)
