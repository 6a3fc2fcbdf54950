"""Finalise an encoding run: check its receipts, then make all its rows visible in one commit."""

from collections.abc import Iterator, Sequence
from typing import Any

from functa.storage.functaset.commit import commit
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.history import as_rows, latest
from functa.storage.functaset.plan import SPLITS
from functa.storage.functaset.quantizer import refuse_clipping
from functa.storage.functaset.receipts.receipt import Receipt, sum_of_contents
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.address import open_location
from functa.storage.places.side_by_side import side_by_side
from functa.tasks.encoding.plan import EncodeJob, Planned
from functa.tasks.encoding.repair import other_images
from functa.tasks.inputs.pictures import refuse_too_many_bad


def finalise(job: EncodeJob, planned: Planned) -> dict[str, Any]:
    """Commit what was planned; return {info, bad_inputs: [{key, reason}]} of the whole functaset.

    Raises StorageError if more images are bad than images.max_bad_fraction allows, more of their numbers are clipped
    than max_clip_fraction does, a shard is missing, or a repair encoded other images than the damaged fragment held.
    """
    location = open_location(job.functaset)
    for fragment, content in planned.contents.items():
        _check_content(job, fragment, content)
    _check_bad(job, planned.fragments)
    _check_clipped(job, planned.fragments)
    retire = {fragment: as_rows(ranges) for fragment, ranges in planned.retire.items()}
    commit(location, planned.fragments, retire, retire_fragments=planned.drop)
    functaset = Functaset.open(location)
    return {"info": functaset.info(), "bad_inputs": functaset.bad_inputs()}


def _check_content(job: EncodeJob, fragment_id: str, content: str) -> None:
    fragment = Fragment.load(open_location(job.functaset), fragment_id)
    receipts = [receipt for _, receipt in _receipts(fragment)]
    if sum_of_contents(receipt.content for receipt in receipts if receipt is not None) != content:
        raise other_images(fragment.plan.replaces)


def _check_bad(job: EncodeJob, fragment_ids: Sequence[str]) -> None:
    """Refuse too many bad images, as a share of the added rows and the split's visible ones together."""
    location = open_location(job.functaset)
    newest, planned = latest(location), [Fragment.load(location, name) for name in fragment_ids]
    for split in SPLITS:
        fragments = [fragment for fragment in planned if fragment.split == split]
        found = (pair for fragment in fragments for pair in _receipts(fragment))
        bad = [(shard, receipt) for shard, receipt in found if receipt is not None and receipt.bad]
        if not bad:
            continue
        visible = sum(entry.rows for entry in newest.fragments if entry.split == split) if newest else 0
        shard, receipt = bad[0]
        row, reason = min(receipt.bad.items())
        first = f"{shard.table().keys[row]}: {reason}"
        count = sum(len(receipt.bad) for _, receipt in bad)
        rows = visible + sum(fragment.plan.rows for fragment in fragments)
        refuse_too_many_bad(count, rows, job.images.max_bad_fraction, split, first)


def _check_clipped(job: EncodeJob, fragment_ids: Sequence[str]) -> None:
    """Refuse new fragments whose rows are clipped too often, whatever their shards. A repaired one was accepted."""
    for fragment in (Fragment.load(open_location(job.functaset), name) for name in fragment_ids):
        if fragment.quantizer is None or fragment.plan.replaces:
            continue
        receipts = [receipt for _, receipt in _receipts(fragment) if receipt is not None]
        clipped, rows = sum(each.clipped for each in receipts), sum(each.good for each in receipts)
        limit = job.encode.quantization.max_clip_fraction
        refuse_clipping(f"{job.functaset}, {fragment.split}", clipped, rows, fragment.plan.dims, limit)


def _receipts(fragment: Fragment) -> Iterator[tuple[Shard, Receipt | None]]:
    """Yield each shard with its receipt, which are read side by side."""
    yield from zip(fragment.shards, side_by_side(fragment.location, Shard.find_receipt, fragment.shards), strict=True)
