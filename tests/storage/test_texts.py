"""Texts in one block: the same as a list of them, whatever characters they have."""

import hashlib
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from functa.storage.functaset.plan import RowTable, row_id, row_ids
from functa.storage.functaset.records import canonical
from functa.storage.texts import Index, Packing, Texts, as_json, encoded

TEXT = st.text(st.one_of(st.sampled_from('ab/"\\\0\n.'), st.characters()), max_size=6)

TEXTS = st.lists(TEXT, max_size=30)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.data())
def test_texts_are_the_list_that_they_were_made_of(texts: list[str], data: st.DataObject) -> None:
    packed = Texts.of(texts)
    assert packed == texts and list(packed) == texts and [packed[i] for i in range(len(texts))] == texts
    assert list(encoded(packed)) == [text.encode("utf-8", "surrogatepass") for text in texts]
    assert as_json(packed) == json.dumps(texts, separators=(",", ":")).encode()
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=40) if texts else st.just(list[int]()))
    taken = packed.take(np.array(rows, np.int64))
    assert taken == [texts[row] for row in rows]
    assert as_json(taken) == json.dumps([texts[row] for row in rows], separators=(",", ":")).encode()
    assert packed.repeat(3) == [text for text in texts for _ in range(3)]
    assert packed.bytes_at(np.full(len(texts), -1)).tolist() == [
        text.encode("utf-8", "surrogatepass")[-1] if text else 0 for text in texts
    ]


@given(TEXTS, TEXT)
def test_a_prefix_is_put_before_each_text(texts: list[str], prefix: str) -> None:
    packing = Packing()
    packing.add(texts, prefix)
    packing.add(["x"])
    assert packing.packed() == [*(prefix + text for text in texts), "x"]


@given(st.lists(TEXT, unique=True, max_size=30), TEXTS)
def test_an_index_finds_what_is_there(texts: list[str], wanted: list[str]) -> None:
    place = {text: i for i, text in enumerate(texts)}
    expected = [place.get(text, -1) for text in [*wanted, *texts]]
    for given_texts in (texts, Texts.of(texts)):
        assert Index(given_texts).find([*wanted, *texts]).tolist() == expected


def test_texts_of_one_hash_differ_by_their_letters() -> None:
    index = Index(["a", "b", "c"])
    index._hashes[:] = hash("c")
    assert index.find(["c", "d"]).tolist() == [2, -1]


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=20), st.integers(1, 3))
def test_tables_of_texts_are_stored_as_tables_of_lists(keys: list[str], each: int) -> None:
    repeated = [key for key in keys for _ in range(each)]
    packed, tokens = Texts.of(keys).repeat(each), Texts.of(repeated)
    assert [bytes(row) for row in row_ids(packed)] == [row_id(key) for key in repeated]
    table = RowTable.of(packed, np.arange(len(repeated)), tokens, np.ones(len(repeated)))
    numbers = {"labels": list(range(len(repeated))), "rows": list(range(len(repeated)))}
    stored = canonical({"keys": repeated, "tokens": repeated, "augmentations": [1] * len(repeated), **numbers})
    assert hashlib.sha256(table.to_bytes(True)).digest() == hashlib.sha256(stored).digest()
    assert RowTable.from_bytes(stored).keys == repeated
