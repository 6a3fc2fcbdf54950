"""A finished fragment on its way into a commit: every shard has its receipt, every object its length; its manifest."""

from collections.abc import Callable
from dataclasses import dataclass

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.history import FragmentEntry
from functa.storage.functaset.plan import Name
from functa.storage.functaset.receipts.manifest import (
    Manifest,
    ManifestWriter,
    blocks_key,
    manifest_key,
    shards_of_block,
)
from functa.storage.functaset.receipts.moments import Merging, Moments
from functa.storage.functaset.receipts.receipt import Receipt
from functa.storage.functaset.records import ObjectRecord, vouch
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side

Finished = tuple[Receipt, ObjectRecord]


@dataclass(frozen=True)
class Made:
    """A fragment's manifest with its objects by key, the first and last of its rows' names, and its moments.

    The latter only where they are needed to merge them by blocks.
    """

    manifest: Manifest
    record: ObjectRecord
    objects: dict[str, bytes]
    names: tuple[tuple[str, int], tuple[str, int]]
    moments: Moments | None


def finished(fragment: Fragment) -> tuple[FragmentEntry, Moments | None]:
    """Return a new fragment's entry, its manifest written, and Made.moments.

    Raises StorageError: a shard is not finished; damage.
    """
    location, plan = fragment.location, fragment.plan
    sizes = {entry.key: entry.size for entry in location.entries(f"{plan.path}/")}
    made = make_manifest(fragment, lambda shard: _finished(shard, sizes))
    for key, data in made.objects.items():
        put(location, key, data)
    entry = FragmentEntry(
        fragment=plan.id, split=plan.split, rows=made.manifest.rows, bad=made.manifest.bad, retired=(),
        plan=vouch(location.read(f"{plan.path}/plan.json")), manifest=made.record, names=made.names,
    )  # fmt: skip
    return entry, made.moments


def with_manifest(location: Location, entry: FragmentEntry) -> FragmentEntry:
    """Return an entry that names every receipt as one that names a manifest, which is written.

    Where a receipt or a table is damaged, also of a shard that nobody reads any more, it stays as it is.
    """
    if entry.manifest is not None:
        return entry
    try:
        fragment = Fragment.committed(location, entry)
        made = make_manifest(fragment, lambda shard: (shard.stored_receipt, entry.receipts[shard.number]))
    except (DamagedObject, MissingObject):
        return entry
    for key, data in made.objects.items():
        put(location, key, data)
    return entry.model_copy(update={"receipts": (), "manifest": made.record, "names": made.names})


def _finished(shard: Shard, sizes: dict[str, int]) -> Finished:
    """Return a shard's receipt and its record. sizes: of the fragment's objects, as they were listed."""
    fragment, found = shard.fragment, shard.find_stored()
    if found is None:
        raise StorageError(
            f"fragment {fragment.id}: shard {shard.number} of {fragment.plan.shards} is not finished; encode it first"
        )
    for key, record in found[0].objects.items():
        path = f"{fragment.plan.path}/{key}"
        if sizes.get(path) != record.bytes and fragment.location.size(path) != record.bytes:
            raise DamagedObject(f"{fragment.name}/{key}: is missing or short; restore it, or encode in a new root")
    return found


def make_manifest(fragment: Fragment, read: Callable[[Shard], Finished]) -> Made:
    """Return the manifest of a fragment whose receipts `read` returns; the same for the same receipts."""
    location, plan = fragment.location, fragment.plan
    size = shards_of_block(plan.shards)
    blocks = Blocks(plan.latent_shape, size) if plan.split == "train" and plan.shards > size else None

    def read_all(shard: Shard) -> tuple[Shard, Finished, list[Name], Moments | None]:
        found = read(shard)
        return shard, found, shard.table().names, shard.moments_of(found[0]) if blocks else None

    writer, ends = ManifestWriter(plan), list[Name]()
    for shard, (receipt, record), names, moments in side_by_side(location, read_all, fragment.shards):
        try:
            writer.add(receipt, record, names)
        except (ValueError, OverflowError) as error:
            raise DamagedObject(f"{location.uri}/{shard.receipt_key}: {error}; encode the shard again") from None
        ends = [min([*ends, *names]), max([*ends, *names])]
        if blocks is not None and moments is not None:
            blocks.add(moments)
    objects, stored = dict[str, bytes](), None
    if blocks is not None:
        stored = vouch(data := blocks.to_bytes())
        objects[blocks_key(plan.id)] = data
    manifest = writer.manifest(size, stored)
    record = vouch(data := manifest.to_bytes())
    objects[manifest_key(plan.id)] = data
    first, last = ((name.hex(), number) for name, number in ends)
    return Made(manifest, record, objects, (first, last), None if blocks is None else blocks.all.moments)


class Blocks:
    """Merged moments of blocks of shards, and of all."""

    def __init__(self, latent_shape: tuple[int, int, int], size: int) -> None:
        self.latent_shape, self.size = latent_shape, size
        self.all, self.parts = Merging(latent_shape), list[Merging]()
        self.count = 0

    def add(self, part: Moments) -> None:
        """Take the next shard's."""
        if self.count % self.size == 0:
            self.parts.append(Merging(self.latent_shape))
        self.parts[-1].add(part)
        self.all.add(part)
        self.count += 1

    def to_bytes(self) -> bytes:
        """Return those of the blocks, as they are stored."""
        return b"".join(part.moments.to_bytes() for part in self.parts)


def put(location: Location, key: str, data: bytes) -> None:
    """Put an object that only these bytes belong to: what is damaged there is replaced."""
    if not location.create(key, data) and _differs(location, key, data):
        location.write(key, data)  # or it was collected meanwhile


def _differs(location: Location, key: str, data: bytes) -> bool:
    try:
        return location.read(key, limit=len(data)) != data
    except (MissingObject, DamagedObject):
        return True
