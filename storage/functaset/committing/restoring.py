"""Manifests are written again from the receipts, and receipts from the manifest: each holds what the other does."""

from functa.storage.errors import DamagedObject, MissingObject
from functa.storage.functaset.committing.finished import Finished, make_manifest
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.receipts.manifest import blocks_key, manifest_key
from functa.storage.functaset.records import read_vouched, seal, vouch
from functa.storage.functaset.shards.shard import Shard


def restore_manifest(fragment: Fragment) -> bool:
    """Write a committed fragment's manifest again, and what it names, if it is damaged; return True.

    Raises StorageError if that cannot be done.
    """
    assert fragment.entry is not None
    location, record = fragment.location, fragment.entry.manifest
    assert record is not None
    try:
        read_vouched(location, manifest_key(fragment.id), record)
        blocks = fragment.manifest and fragment.manifest.described.blocks
        if blocks:
            read_vouched(location, blocks_key(fragment.id), blocks)
        return True
    except (DamagedObject, MissingObject) as error:
        made = make_manifest(Fragment(location, fragment.plan), _stored)
        if made.record != record:
            raise error
    for key, data in made.objects.items():
        location.write(key, data)
    return True


def _stored(shard: Shard) -> Finished:
    found = shard.find_stored()
    if found is None:
        raise MissingObject(f"{shard.fragment.location.uri}/{shard.receipt_key}: is missing; restore it from a copy")
    return found


def restore_receipt(shard: Shard) -> None:
    """Write a committed shard's damaged receipt again. Raises StorageError if that cannot be."""
    location, manifest = shard.fragment.location, shard.fragment.manifest
    assert manifest is not None
    try:
        read_vouched(location, shard.receipt_key, manifest.receipt_record(shard.number))
    except (DamagedObject, MissingObject):
        data = seal(manifest.receipt(shard.number))
        if vouch(data) != manifest.receipt_record(shard.number):
            raise
        location.write(shard.receipt_key, data)
