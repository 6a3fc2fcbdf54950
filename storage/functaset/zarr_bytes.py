"""A fragment's arrays as zarr v3 documents and shard objects, made and read in memory.

zarr writes into a memory store and the bytes are then put by the caller, so that create-only semantics, length and
sha256 all come from the same bytes. Standard codecs only: any zarr v3 reader opens them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from functa.storage.errors import DamagedObject

CODECS = frozenset({"bytes", "zstd", "blosc", "crc32c", "sharding_indexed"})

MAX_CHUNK_BYTES = 8 << 30

CHECKSUM_BYTES = 4

# The names in zarr.json, by ArraySpec.codec.
COMPRESSORS: dict[str, list[str]] = {"raw": [], "zstd": ["zstd"], "exact": ["blosc"]}

ABSENT = (1 << 64) - 1  # offset and length, in a shard's index, of a chunk that is not there

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class ArraySpec:
    """Shape, type and coding of a fragment's array, which its zarr.json must match. shard_rows 0: no sharding."""

    shape: tuple[int, ...]
    dtype: str
    shard_rows: int = 0
    chunk_rows: int = 0
    codec: Literal["raw", "zstd", "exact"] = "raw"
    dimensions: tuple[str, ...] = ()

    @property
    def fill(self) -> float | int:
        """Fill value of absent chunks, which our readers never accept: NaN where the type has one."""
        return float("nan") if np.dtype(self.dtype).kind == "f" else 0


def new_document(spec: ArraySpec, attributes: dict[str, Any] | None = None) -> bytes:
    """Return the array's zarr.json."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    choices: dict[str, list[Any]] = {
        "raw": [],
        # Level 1 is entropy coding alone, which packs codes tighter than level 3.
        "zstd": [ZstdCodec(level=1)],
        # Bit planes: the empty ones vanish, the others cost their own bits. lz4 would add 0.03 bits a number for them.
        "exact": [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=1)],
    }
    store = MemoryStore()
    sharded = spec.shard_rows > 0
    zarr.create_array(
        store,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(spec.chunk_rows, *spec.shape[1:]) if sharded else spec.shape,
        shards=(spec.shard_rows, *spec.shape[1:]) if sharded else None,
        compressors=[*choices[spec.codec], Crc32cCodec()],
        filters=None,
        fill_value=spec.fill,
        dimension_names=spec.dimensions or None,
        attributes=attributes or {},
        zarr_format=3,
    )
    return _contents(store)["zarr.json"]


def new_group(attributes: dict[str, Any]) -> bytes:
    """Return a group's zarr.json."""
    document = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(document, indent=2, allow_nan=False).encode()


def encode(document: bytes, spec: ArraySpec, block: np.ndarray, shard: int = 0) -> tuple[str, bytes]:
    """Encode a whole shard's rows; return (key below the array, object bytes)."""
    rows = shard_slice(spec, shard)
    if block.shape != (rows.stop - rows.start, *spec.shape[1:]):
        raise ValueError(f"block {block.shape} is not the whole of shard {shard}, rows {rows.start} to {rows.stop}")
    key = chunk_key(spec, shard)
    if _is_plain(document, spec) and (rows.stop - rows.start) % spec.chunk_rows == 0:
        return key, _encode_plain(spec, np.ascontiguousarray(block, dtype=spec.dtype))
    store = _memory({"zarr.json": document})
    _open(store, writable=True)[rows] = np.ascontiguousarray(block, dtype=spec.dtype)
    return key, _contents(store)[key]


def decode(document: bytes, spec: ArraySpec, data: bytes, shard: int = 0) -> np.ndarray:
    """Decode a shard's object bytes; return its rows. `document` must have passed check_document.

    Raises DamagedObject (unnamed: the caller knows the key) where the bytes do not decode.
    """
    store = _memory({"zarr.json": document, chunk_key(spec, shard): data})
    if not data:
        raise DamagedObject("the object is empty")  # zarr would return fill values
    if spec.codec != "raw" and spec.shard_rows:
        size = int(np.prod(spec.shape[1:], dtype=np.int64)) * spec.chunk_rows * np.dtype(spec.dtype).itemsize
        _check_declared_sizes(spec.codec, data, spec.shard_rows // spec.chunk_rows, size)
    try:
        return np.asarray(_open(store, writable=False)[shard_slice(spec, shard)])
    except Exception as error:  # codecs raise ValueError, RuntimeError, numcodecs' and zarr's own
        raise DamagedObject(f"does not decode ({error})") from None


def _check_declared_sizes(codec: str, data: bytes, chunks: int, size: int) -> None:
    """Raise DamagedObject (unnamed) unless every chunk of a shard declares `size` bytes, and lies inside the shard.

    codec: "zstd", or "exact" for blosc. A few bytes may otherwise grow to whatever they declare.
    """
    index = len(data) - 16 * chunks - 4  # (offset, length) of every chunk, then the index's own checksum
    if index < 0:
        raise DamagedObject("is shorter than its index")
    for offset, length in np.frombuffer(data, "<u8", 2 * chunks, index).reshape(chunks, 2).tolist():
        if (offset, length) == (ABSENT, ABSENT):
            continue
        if offset + length > index:
            raise DamagedObject("its index leads out of it")
        chunk = data[offset : offset + length]
        declared = _zstd_size(chunk) if codec == "zstd" else int.from_bytes(chunk[4:8], "little")
        if declared != size:
            raise DamagedObject(f"a chunk declares {declared} bytes where the plan has {size}")


def _zstd_size(frame: bytes) -> int | None:
    """Return the size that a zstd frame declares (RFC 8878, 3.1.1.1), None for one that declares none."""
    if frame[:4] != ZSTD_MAGIC or len(frame) < 18:
        return None
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    at = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0) if width else None


def chunk_offsets(document: bytes, spec: ArraySpec, data: np.ndarray, shard: int) -> np.ndarray | None:
    """Return where each chunk's rows begin in an uncompressed shard's bytes uint8 [n], int64; None if not plain.

    Plain: nothing but little-endian C-order rows and checksums, by zarr.json and by the shard's own index. `data` must
    be what a receipt records, and `document` have passed check_document: checksums are not looked at here.
    """
    if not _is_plain(document, spec):
        return None
    chunks = spec.shard_rows // spec.chunk_rows
    rows = shard_slice(spec, shard)
    used = -(-(rows.stop - rows.start) // spec.chunk_rows)
    index = 16 * chunks + 4  # (offset, length) of every chunk, then the index's own checksum
    if len(data) < index:
        return None
    entries = np.frombuffer(data[len(data) - index : len(data) - 4].tobytes(), "<u8").reshape(chunks, 2)[:used]
    size = int(np.prod(spec.shape[1:], dtype=np.int64)) * spec.chunk_rows * np.dtype(spec.dtype).itemsize
    if (entries[:, 1] != size + 4).any() or (entries[:, 0] > len(data) - index - (size + 4)).any():
        return None
    return entries[:, 0].astype(np.int64)


def decode_vouched(document: bytes, spec: ArraySpec, data: bytes, shard: int = 0) -> np.ndarray:
    """Decode bytes that a receipt records: chunks that are plain rows are copied without a second checksum."""
    flat = np.frombuffer(data, np.uint8)
    offsets = chunk_offsets(document, spec, flat, shard)
    if offsets is None:
        return decode(document, spec, data, shard)
    rows = shard_slice(spec, shard)
    block: np.ndarray = np.empty((rows.stop - rows.start, *spec.shape[1:]), spec.dtype)
    for number, offset in enumerate(offsets.tolist()):
        part = block[number * spec.chunk_rows : (number + 1) * spec.chunk_rows].reshape(-1).view(np.uint8)
        part[:] = flat[offset : offset + part.size]
    return block


def check_document(document: bytes, spec: ArraySpec) -> None:
    """Refuse a zarr.json that is not this array's, before any memory is taken. Raises DamagedObject (unnamed)."""
    try:
        found = json.loads(document)
        chunks = found["chunk_grid"]["configuration"]["chunk_shape"]
        facts = (
            found["zarr_format"],
            found["node_type"],
            found["shape"],
            found["data_type"],
            chunks,
            found["chunk_key_encoding"],
        )
        names, inner = _codecs(found["codecs"])
        chain = found["codecs"][0]["configuration"]["codecs"] if spec.shard_rows else found["codecs"]
        order = [codec["name"] for codec in chain]
    except (ValueError, LookupError, TypeError, RecursionError, AttributeError) as error:
        raise DamagedObject(f"not an array's zarr.json ({type(error).__name__})") from None
    tail = list(spec.shape[1:])
    expected = (
        3,
        "array",
        list(spec.shape),
        np.dtype(spec.dtype).name,
        [spec.shard_rows, *tail] if spec.shard_rows else list(spec.shape),
        {"name": "default", "configuration": {"separator": "/"}},
    )
    for what, is_, should in zip(
        ("format", "node", "shape", "type", "shard", "key encoding"), facts, expected, strict=True
    ):
        if is_ != should:
            raise DamagedObject(f"{what} {is_} where the plan has {should}")
    if not names <= CODECS:
        raise DamagedObject(f"codecs {sorted(names - CODECS)} are not among {sorted(CODECS)}")
    wanted = ["bytes", *COMPRESSORS[spec.codec], "crc32c"]
    if order != wanted or len(found["codecs"]) != (1 if spec.shard_rows else len(wanted)):
        raise DamagedObject(f"codecs {order} where the plan has {wanted}")
    if inner != ([[spec.chunk_rows, *tail]] if spec.shard_rows else []):
        raise DamagedObject(f"chunks {inner} where the plan has {spec.chunk_rows} rows")


def _is_plain(document: bytes, spec: ArraySpec) -> bool:
    """Return whether a shard is only its chunks' little-endian C-order rows, checksums and an index at the end."""
    if not spec.shard_rows or np.dtype(spec.dtype).itemsize == 1:  # uint8 has no byte order
        return False
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    codecs = json.loads(document)["codecs"]
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        return False
    inside = codecs[0]["configuration"]
    return bool(
        inside["codecs"] == plain and inside["index_codecs"] == plain and inside.get("index_location", "end") == "end"
    )


def _encode_plain(spec: ArraySpec, block: np.ndarray) -> bytes:
    """Return the bytes that zarr would write of whole chunks [n, ...], with one copy where zarr makes several."""
    chunks = [block[start : start + spec.chunk_rows].reshape(-1) for start in range(0, len(block), spec.chunk_rows)]
    index = np.full((spec.shard_rows // spec.chunk_rows, 2), ABSENT, "<u8")  # that of a chunk that is not there
    size = chunks[0].nbytes + CHECKSUM_BYTES
    for number in range(len(chunks)):
        index[number] = number * size, size
    parts = [part for chunk in (*chunks, index) for part in (chunk.data.cast("B"), _checksum(chunk))]
    return b"".join(parts)


def _checksum(chunk: np.ndarray) -> bytes:
    """Return the CRC-32C as zarr's codec of that name writes it."""
    from google_crc32c import value

    return int(value(chunk.reshape(-1).view(np.uint8))).to_bytes(CHECKSUM_BYTES, "little")


def shard_slice(spec: ArraySpec, shard: int) -> slice:
    """Return the rows of a shard; the last may be ragged."""
    if not spec.shard_rows:
        return slice(0, spec.shape[0])
    return slice(shard * spec.shard_rows, min((shard + 1) * spec.shard_rows, spec.shape[0]))


def chunk_key(spec: ArraySpec, shard: int) -> str:
    """Return zarr's default key of a shard, below the array."""
    return "/".join(["c", str(shard), *["0"] * (len(spec.shape) - 1)])


def _codecs(codecs: Sequence[dict[str, Any]]) -> tuple[set[str], list[list[int]]]:
    """Return the names of all codecs, nested ones too, and the chunk shapes of sharding codecs."""
    names: set[str] = set()
    shapes: list[list[int]] = []
    for codec in codecs:
        names.add(str(codec["name"]))
        if codec["name"] == "sharding_indexed":
            inside = codec["configuration"]
            shapes.append(list(inside["chunk_shape"]))
            for nested in (inside["codecs"], inside["index_codecs"]):
                more, deeper = _codecs(nested)
                names |= more
                shapes += deeper
    return names, shapes


def _memory(objects: dict[str, bytes]) -> Any:
    from zarr.buffer import cpu
    from zarr.storage import MemoryStore

    return MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in objects.items()})


def _open(store: Any, writable: bool) -> Any:
    import zarr

    array = zarr.open_array(store, mode="r+" if writable else "r", zarr_format=3)
    # Without write_empty_chunks a shard of fill values leaves no object, and a finished one would look missing.
    return array.with_config({"write_empty_chunks": True})


def _contents(store: Any) -> dict[str, bytes]:
    return {key: value.to_bytes() for key, value in store._store_dict.items()}
