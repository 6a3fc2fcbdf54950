"""Checkpoints, exported weights and arrays of the report, changed at random: loaded, or named in one error class."""

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functa.storage.errors import DamagedObject, StorageError
from functa.storage.places.address import open_location
from functa.storage.runs.checkpoints import load_checkpoint, newest_metadata, newest_step, save_checkpoint
from functa.storage.runs.weights import packed, read_description, read_weights, unpacked, write_weights
from functa.tasks.evaluation.evaluator_input import read_arrays, write_arrays
from tests.fuzz.test_records import drawn, replaced
from tests.helpers.fuzzing import examples, mutated

pytestmark = [pytest.mark.attacks, pytest.mark.fuzz]

TENSORS = {"model.a": np.arange(6, dtype=np.float32).reshape(2, 3), "average.b": np.zeros((), np.int64)}


def headers() -> st.SearchStrategy[bytes]:
    """Draw safetensors files whose headers declare what is not there."""
    names = st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "U128", ""])
    sizes = st.lists(st.sampled_from([-1, 0, 1, 2, 1 << 40, 1 << 63]), max_size=4)
    ends = st.lists(st.sampled_from([-1, 0, 4, 8, 24, 1 << 40, 1 << 64]), max_size=3)
    entry = st.fixed_dictionaries({"dtype": names, "shape": sizes, "data_offsets": ends})
    return st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entry, max_size=2).map(_file)


def _file(header: object) -> bytes:
    import json

    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


def test_changed_safetensors_load_or_are_named() -> None:
    @examples(60)
    @given(st.one_of(mutated([packed(TENSORS)]), headers()))
    def check(data: bytes) -> None:
        with suppress(DamagedObject):
            for value in unpacked(data, "x", "fix").values():
                assert value.nbytes <= len(data)

    check()


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_changed_checkpoints_load_or_an_older_one_does(tmp_path: Path, ending: str) -> None:
    location = open_location(str(tmp_path))
    for step in (1, 2):
        save_checkpoint(location, step, TENSORS, {"finished": True})
    path = tmp_path / f"step-00000002.{ending}"

    @examples(20)
    @given(drawn(path, lambda value: value) if ending == "json" else mutated([path.read_bytes()]))
    def check(data: bytes) -> None:
        def use() -> None:
            found = load_checkpoint(location)
            assert found is not None and found.step in (1, 2)

        replaced(path, data, use, NeverRaised)
        reads: tuple[Callable[[], object], ...] = (
            lambda: load_checkpoint(location, 2), lambda: newest_step(location), lambda: newest_metadata(location)
        )  # fmt: skip
        for read in reads:
            replaced(path, data, read, StorageError)

    check()


class NeverRaised(Exception):
    """An error that nothing raises: every error fails the test."""


@pytest.mark.parametrize("name", ["weights.json", "weights.safetensors"])
def test_changed_weights_are_read_or_named(tmp_path: Path, name: str) -> None:
    location, path = open_location(str(tmp_path)), tmp_path / name
    write_weights(location, TENSORS, {"classes": 3})

    @examples(20)
    @given(drawn(path, lambda value: value) if name.endswith("json") else mutated([path.read_bytes()]))
    def check(data: bytes) -> None:
        replaced(path, data, lambda: read_weights(location), DamagedObject)
        replaced(path, data, lambda: read_description(location), DamagedObject)

    check()


def test_changed_arrays_of_a_report_are_read_or_named(tmp_path: Path) -> None:
    write_arrays(str(tmp_path), "x", a=np.arange(12.0), names=np.array(["a", "b"]))
    path = tmp_path / "arrays" / "x.npz"
    plain = io.BytesIO()
    np.savez(plain, a=np.arange(6))

    @examples(40)
    @given(mutated([path.read_bytes(), plain.getvalue()]))
    def check(data: bytes) -> None:
        replaced(path, data, lambda: read_arrays(str(tmp_path), "x"), StorageError)

    check()
