"""A functaset compared with a dict, after any order of plans, writes, kills, commits, retirements, damage, repairs and
collections: readers see exactly the rows of the dict, in every version that is kept."""

import hashlib
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset import history
from functa.storage.functaset.commit import commit, retire
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import latest, load_commit
from functa.storage.functaset.plan import Plan, RowTable
from functa.storage.functaset.planning import plan_fragment
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.storage.functaset.receipts import manifest
from functa.storage.functaset.shards.writing import write_shard
from functa.storage.places.location import Location
from functa.storage.upkeep.compact import compact
from functa.storage.upkeep.gc import collect
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import SHAPE, latents_of, new_store, shard_of
from tests.helpers.storage.mortal import Killed, Mortal
from tests.helpers.storage.needed_keys import needed_keys

SPLITS = ("train", "test")
LARGE = history.LIST_ENTRIES, manifest.MANY_SHARDS
Shown = dict[tuple[str, str], int]  # (split, key) -> which of the image's states is encoded


@dataclass
class Pending:
    """A planned fragment, the states of its images, and the images whose rows are to be bad."""

    plan: Plan
    states: dict[str, int]
    bad: set[str]


class Store(RuleBasedStateMachine):
    pending = Bundle("pending")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="functaset-"))
        self.shown: Shown = {}
        self.history: dict[int, Shown] = {}
        self.images = 0
        self.states: Shown = {}
        self.collected: set[str] = set()  # fragments that gc took

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        history.LIST_ENTRIES, manifest.MANY_SHARDS = LARGE

    @initialize(bits=st.sampled_from([8, 32]), sizes=st.sampled_from([LARGE, (2, 1)]))
    def begin(self, bits: int, sizes: tuple[int, int]) -> None:
        history.LIST_ENTRIES, manifest.MANY_SHARDS = sizes
        self.place = new_store(self.folder, {"bits": bits})
        wide = np.concatenate([latents_of([f"{i}" for i in range(64)]), np.full((1, *SHAPE), 1), -np.ones((1, *SHAPE))])
        self.quantizer: Quantizer | None = calibrate(QuantizationConfig(bits=bits), wide)
        for split in SPLITS:
            self.whole(self.plan_new(split, 7, 2))

    # What is encoded of an image is a function of its key and state.

    def latents(self, keys: list[str], states: dict[str, int]) -> np.ndarray:
        return latents_of([f"{key}#{states[key]}" for key in keys])

    def expected(self, key: str, state: int) -> bytes:
        z = self.latents([key], {key: state})
        return (self.quantizer.decode(self.quantizer.encode(z)[0]) if self.quantizer else z).tobytes()

    def planned(self, split: str, states: dict[str, int], bad: set[str], replaces: str = "") -> Pending:
        keys = sorted(states)
        tokens = [f"{key}#{states[key]}" for key in keys]
        plan = plan_fragment(
            self.place, RowTable.of(keys, np.arange(len(keys)) % 3, tokens), split=split,
            latent_shape=SHAPE, shard_rows=3, chunk_rows=2, quantizer=self.quantizer, replaces=replaces,
        )  # fmt: skip
        return Pending(plan.plan, states, bad)

    def write_one(self, work: Pending, shard: int, place: Location | None = None) -> None:
        rows = shard_of(self.place, work.plan, shard).table()
        good = np.array([key not in work.bad for key in rows.keys])
        digests = [hashlib.sha256(f"{key}#{work.states[key]}".encode()).digest() for key in rows.keys]
        write_shard(
            shard_of(place or self.place, work.plan, shard), latents=self.latents(rows.keys, work.states),
            psnr=np.full(len(good), 30.0), sha256=np.array([list(d) for d in digests], np.uint8), good=good,
            reasons={int(row): "spoilt" for row in np.flatnonzero(~good)},
        )  # fmt: skip

    def committed(self, version: int) -> None:
        self.history[version] = dict(self.shown)

    def show(self, work: Pending) -> None:
        self.shown |= {(work.plan.split, k): state for k, state in work.states.items() if k not in work.bad}

    @rule(target=pending, split=st.sampled_from(SPLITS), count=st.integers(1, 7), spoilt=st.integers(0, 6))
    def plan(self, split: str, count: int, spoilt: int) -> Pending:
        return self.plan_new(split, count, spoilt)

    @rule(split=st.sampled_from(SPLITS), count=st.integers(1, 7), spoilt=st.integers(0, 6))
    def encode_new_images(self, split: str, count: int, spoilt: int) -> None:
        self.whole(self.plan_new(split, count, spoilt))

    def whole(self, work: Pending, retired: dict[str, list[int]] | None = None) -> None:
        for shard in range(work.plan.shards):
            self.write_one(work, shard)
        version = commit(self.place, [work.plan.id], retired).version
        self.show(work)
        self.committed(version)

    def plan_new(self, split: str, count: int, spoilt: int) -> Pending:
        keys = [f"{split}/{self.images + i:04d}" for i in range(count)]
        self.images += count
        self.states |= {(split, key): 0 for key in keys}
        return self.planned(split, dict.fromkeys(keys, 0), set(keys[spoilt : spoilt + 1]))

    @rule(work=pending, shard=st.integers(0, 2))
    def write(self, work: Pending, shard: int) -> None:
        if work.plan.id not in self.collected and shard < work.plan.shards:
            self.write_one(work, shard)

    @rule(work=pending, shard=st.integers(0, 2), writes=st.integers(0, 8))
    def kill(self, work: Pending, shard: int, writes: int) -> None:
        if work.plan.id in self.collected or shard >= work.plan.shards:
            return
        try:
            self.write_one(work, shard, Mortal(self.place.uri, [writes]))
        except Killed:
            assert shard_of(self.place, work.plan, shard).find_receipt() is None

    @rule(target=pending, work=consumes(pending))
    def commit(self, work: Pending) -> object:
        if work.plan.id in self.collected:
            return multiple()
        shards = range(work.plan.shards)
        if all(shard_of(self.place, work.plan, shard).find_receipt() is not None for shard in shards):
            self.show(work)
            self.committed(commit(self.place, [work.plan.id]).version)
            return multiple()
        before = latest(self.place)
        with pytest.raises(StorageError, match="is not finished"):
            commit(self.place, [work.plan.id])
        assert latest(self.place) == before
        return work

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def encode_changed_images(self, data: st.DataObject) -> None:
        split = data.draw(st.sampled_from(sorted({split for split, _ in self.shown})))
        shown = sorted(key for name, key in self.shown if name == split)
        keys = data.draw(st.lists(st.sampled_from(shown), min_size=1, max_size=4, unique=True))
        for key in keys:
            self.states[split, key] += 1
        work = self.planned(split, {key: self.states[split, key] for key in keys}, set())
        self.whole(work, self.rows_of(split, set(keys)))

    def rows_of(self, split: str, keys: set[str]) -> dict[str, list[int]]:
        newest, rows = latest(self.place), {}
        assert newest is not None
        for fragment in Functaset.open(self.place).fragments:
            if fragment.split == split:
                rows[fragment.id] = [row for row, key, _ in fragment.visible_keys() if key in keys]
        return rows

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        split = data.draw(st.sampled_from(sorted({split for split, _ in self.shown})))
        shown = sorted(key for name, key in self.shown if name == split)
        keys = data.draw(st.lists(st.sampled_from(shown), min_size=1, max_size=3, unique=True))
        made = retire(self.place, split, keys)
        for key in keys:
            del self.shown[split, key]
        self.committed(made.version)

    @precondition(lambda self: self.history)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "empty", "delete"]))
    def tamper(self, data: st.DataObject, how: str) -> None:
        """Damage any object: reported if the newest version needs it, and never read as something else."""
        files = sorted(
            path for path in self.folder.rglob("*")
            if path.is_file() and path.stat().st_size and not path.name.endswith(".partial")
        )  # fmt: skip
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        at = data.draw(st.integers(0, max(0, len(whole) - 1)))
        spoilt = {"flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "cut": whole[:at], "empty": b""}
        needed_before = needed_keys(self.folder, max(self.history))
        path.unlink() if how == "delete" else path.write_bytes(spoilt[how])
        key = str(path.relative_to(self.folder))
        needed = key in needed_before
        bad = [each["path"] for each in verify(self.place, deep=True).bad]
        same = path.exists() and path.read_bytes() == whole
        missing = not path.exists()
        # The newest mark may be missing: a committer may have been killed before it.
        fatal = needed and not same and not (missing and key == f"commits/{max(self.history):08d}.sha256")
        if key == "fragments/zarr.json":  # only other zarr readers look at it, and it vouches for nothing
            assert not missing or bad == [key]
        else:
            assert ((key if missing else key.replace(".sha256", ".json")) in bad) == fatal, (key, how, bad)
        try:
            self.newest_is_as_it_should_be()
        except StorageError:
            assert fatal
        path.write_bytes(whole)  # restore it from a copy

    @precondition(lambda self: self.shown)
    @rule(data=st.data())
    def repair(self, data: st.DataObject) -> None:
        """Move a damaged shard's rows to a new fragment, as tasks/encoding/repair.py does with real images."""
        fragments = Functaset.open(self.place).fragments
        fragment = fragments[data.draw(st.integers(0, len(fragments) - 1))]
        plan, live = fragment.plan, fragment.live
        shard = live[data.draw(st.integers(0, len(live) - 1))]
        rows = range(shard.first, shard.first + shard.size)
        keys = [key for row, key, _ in fragment.visible_keys() if row in rows]
        path = self.folder / plan.path / "z/c" / str(shard.number) / "0/0/0"
        whole = path.read_bytes()
        path.write_bytes(b"")
        new = []
        if keys:
            work = self.planned(plan.split, {k: self.shown[plan.split, k] for k in keys}, set(), replaces=plan.id)
            for each in range(work.plan.shards):
                self.write_one(work, each)
            new = [work.plan.id]
        self.committed(commit(self.place, new, {plan.id: rows}).version)
        assert verify(self.place, deep=True).bad == []
        self.newest_is_as_it_should_be()
        path.write_bytes(whole)  # so that older versions can be checked

    @precondition(lambda self: self.history)
    @rule(hours=st.sampled_from([0, 48]))
    def collect(self, hours: int) -> None:
        before = latest(self.place)
        done = collect(self.place, delete=True, now=lambda: time.time() + 3600 * hours)
        self.collected |= set(done.fragments)
        after = latest(self.place)
        assert after is not None and before is not None
        assert (after.fragments, after.retired_fragments) == (before.fragments, before.retired_fragments)
        self.committed(after.version)  # one more, where gc broke the claim of a commit that failed long ago

    @precondition(lambda self: self.history)
    @rule(changes=st.integers(0, 40), hours=st.sampled_from([0, 48]), erase=st.booleans())
    def kill_collection(self, changes: int, hours: int, erase: bool) -> None:
        """Kill it at any change: readers see the same rows; a fragment that it began to delete is never committed."""
        mortal = Mortal(self.place.uri, [changes])
        with suppress(Killed):
            collect(mortal, delete=True, erase_retired=erase, now=lambda: time.time() + 3600 * hours)
        claims = {path.parent.name for path in self.folder.glob("fragments/*/claim") if path.read_bytes() == b"collect"}
        self.collected |= claims
        newest = latest(self.place)
        assert newest is not None
        if newest.version not in self.history:
            self.committed(newest.version)
        self.history = {version: shown for version, shown in self.history.items() if version >= newest.oldest}
        assert verify(self.place, deep=True).bad == []

    @precondition(lambda self: self.shown)
    @rule(data=st.data(), changes=st.integers(0, 12))
    def kill_commit(self, data: st.DataObject, changes: int) -> None:
        split = data.draw(st.sampled_from(sorted({split for split, _ in self.shown})))
        key = data.draw(st.sampled_from(sorted(key for name, key in self.shown if name == split)))
        before = latest(self.place)
        with suppress(Killed):
            commit(Mortal(self.place.uri, [changes]), [], self.rows_of(split, {key}))
        newest = latest(self.place)
        if newest != before:
            assert newest is not None
            del self.shown[split, key]
            self.committed(newest.version)

    @precondition(lambda self: self.history)
    @rule()
    def commit_again(self) -> None:
        before = latest(self.place)
        assert before is not None
        ever = {entry.fragment for version in self.history for entry in load_commit(self.place, version).fragments}
        assert commit(self.place, sorted(ever | set(before.retired_fragments))) == before

    @precondition(lambda self: self.history)
    @rule()
    def erase(self) -> None:
        content = Functaset.open(self.place).content
        done = collect(self.place, delete=True, erase_retired=True)
        self.collected |= set(done.fragments)
        newest = latest(self.place)
        assert newest is not None
        self.committed(newest.version)
        self.history = {version: shown for version, shown in self.history.items() if version >= newest.oldest}
        assert Functaset.open(self.place).content == content
        assert not any(entry.retired for entry in newest.fragments)

    @precondition(lambda self: self.history)
    @rule(changes=st.integers(0, 60))
    def compact(self, changes: int) -> None:
        """Merge small fragments, killed at some change, then to the end: no row changes, and nothing is shown twice."""
        content = Functaset.open(self.place).content
        with suppress(Killed):
            compact(Mortal(self.place.uri, [changes]))
        self.newest_is_the_same(content)
        compact(self.place)
        self.newest_is_the_same(content)
        splits = [entry.split for entry in Functaset.open(self.place).commit.fragments]
        assert len(splits) == len(set(splits))

    def newest_is_the_same(self, content: str) -> None:
        store = Functaset.open(self.place)
        assert store.content == content
        self.committed(store.version)
        self.check(store.version)

    @invariant()
    def newest_is_as_it_should_be(self) -> None:
        if self.history:
            assert Functaset.open(self.place).version == max(self.history)
            self.check(max(self.history))

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self.check(data.draw(st.sampled_from(sorted(self.history))))

    def check(self, version: int) -> None:
        store = Functaset.open(self.place, version)
        seen: dict[tuple[str, str], bytes] = {}
        for split in SPLITS:
            if not store.rows(split):
                continue
            loaded = store.load(split)
            z = loaded.dequantized()
            assert len(set(loaded.keys)) == len(loaded.keys), "an image is visible twice"
            seen |= {(split, key): row.tobytes() for key, row in zip(loaded.keys, z, strict=True)}
        wanted = {(split, key): self.expected(key, state) for (split, key), state in self.history[version].items()}
        assert seen == wanted
