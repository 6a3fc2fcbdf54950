"""Tensors as the bytes of a safetensors file, and back."""

from collections.abc import Mapping

import numpy as np

from storage.errors import DamagedObject


def packed(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    from safetensors.numpy import save

    # safetensors stores a non-contiguous array's memory in the wrong order, without a word.
    return save({name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()})


def unpacked(data: bytes, name: str, mend: str) -> dict[str, np.ndarray]:
    """The tensors. Raises DamagedObject, naming the file and the mend, for bytes that are no such file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedObject(f"{name}: not a safetensors file ({error}); {mend}") from None
