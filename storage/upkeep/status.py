"""Progress of encoding, from plans, receipts and the newest commit alone."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from functa.storage.errors import DamagedObject, MissingObject
from functa.storage.functaset.fragment import Fragment
from functa.storage.functaset.history import Commit, FragmentEntry, latest
from functa.storage.functaset.receipts.manifest import Manifest
from functa.storage.functaset.receipts.receipt import Receipt
from functa.storage.functaset.shards.shard import Shard
from functa.storage.places.location import Location
from functa.storage.places.side_by_side import side_by_side


def status(location: Location, ended: bool = False) -> dict[str, Any]:
    """Return shards done and left, images, bad ones, rows written, seconds of work, and `damage`, a line a record.

    `images` counts the rows that the newest version shows and, while encoding, those written beside it. The shards are
    those of the newest version and, unless encoding has ended, of what is planned beside it. Trusts the receipts.
    """
    damage: list[str] = []
    newest = _newest(location, damage)
    shown = {} if newest is None else {entry.fragment: entry for entry in newest.fragments}
    keys = set(location.list("fragments/"))
    names = {key.split("/")[1] for key in keys if key.split("/")[2:] == ["plan.json"]}
    retired = {*newest.retired_fragments} if newest else set()
    beside = names - retired if newest is None or not ended else set()
    fragments = _fragments(location, sorted({*shown} | beside), shown, damage)
    written = [_written(fragment, keys, damage) for fragment in fragments]
    new = [each for each, fragment in zip(written, fragments, strict=True) if fragment.id not in shown]
    return {
        "done": sum(each.done for each in written),
        "left": sum(fragment.plan.shards for fragment in fragments) - sum(each.done for each in written),
        "images": sum(entry.rows for entry in shown.values()) + sum(each.rows - each.bad for each in new),
        "bad": sum(entry.bad for entry in shown.values()) + sum(each.bad for each in new),  # less those retired
        "rows": sum(each.rows for each in written),
        "seconds": sum(seconds for each in written for seconds in each.seconds),
        "damage": damage,
    }


@dataclass(frozen=True)
class _Written:
    """Finished shards of a fragment, their rows, the bad ones among them, and each shard's seconds."""

    done: int
    rows: int
    bad: int
    seconds: list[float]


def _written(fragment: Fragment, keys: Container[str], damage: list[str]) -> _Written:
    """Sum up a fragment's finished shards: by its manifest, or by every receipt. keys: of all objects there are."""
    uri = fragment.location.uri
    if fragment.entry is not None:
        lost = [shard.receipt_key for shard in fragment.live if shard.receipt_key not in keys]
        damage += [f"{uri}/{key}: is missing" for key in lost]
    manifest = _manifest(fragment, damage)
    if manifest is not None:
        there = [shard.number for shard in fragment.shards if shard.receipt_key in keys]
        rows = sum(fragment.plan.shard_size(number) for number in there)
        return _Written(len(there), rows, manifest.bad, manifest.columns["seconds"][there].tolist())

    def read(shard: Shard) -> Receipt | DamagedObject | None:
        try:
            return shard.find_receipt()
        except DamagedObject as error:
            return error

    found = list(side_by_side(fragment.location, read, fragment.shards))
    damage += [str(each) for each in found if isinstance(each, DamagedObject)]
    receipts = [each for each in found if isinstance(each, Receipt)]
    bad = sum(len(receipt.bad) for receipt in receipts)
    return _Written(
        len(receipts), sum(receipt.rows for receipt in receipts), bad, [receipt.seconds for receipt in receipts]
    )


def _manifest(fragment: Fragment, damage: list[str]) -> Manifest | None:
    try:
        return fragment.manifest
    except (DamagedObject, MissingObject) as error:
        damage.append(str(error))
        return None


def _newest(location: Location, damage: list[str]) -> Commit | None:
    try:
        return latest(location)
    except (DamagedObject, MissingObject) as error:
        damage.append(str(error))
        return None


def _fragments(
    location: Location, names: Sequence[str], shown: Mapping[str, FragmentEntry], damage: list[str]
) -> list[Fragment]:
    """Return the fragments as planned now, with their entries; a commit's record of the plan is not compared."""
    fragments = []
    for name in names:
        try:
            fragments.append(Fragment(location, Fragment.load(location, name).plan, shown.get(name)))
        except DamagedObject as error:
            damage.append(str(error))
        except MissingObject as error:  # gc may have collected others since the listing
            damage += [str(error)] if name in shown else []
    return fragments


def written(location: Location, fragments: Iterable[str]) -> int:
    """Return how many shards of these fragments have a receipt. Lists names, reads nothing."""
    return sum(len(location.list(f"fragments/{fragment}/receipts/")) for fragment in fragments)


ROW_BYTES = 60  # of a row's label, id, PSNR, augmentation and sha256, beside its latent


def bytes_left(location: Location, fragments: Sequence[Fragment]) -> int:
    """Return the bytes that the planned shards will take, with a tenth to spare, less what exists of them already."""
    if location.free_bytes() is None:
        return 0  # nothing to compare it with: spare the listing
    needed = 0.0
    for plan in (fragment.plan for fragment in fragments):
        planned = {f"{plan.path}/{key}" for key in (*plan.objects, "plan.json")}
        existing = sum(entry.size for entry in location.entries(f"{plan.path}/") if entry.key not in planned)
        needed += max(0.0, 1.1 * plan.rows * (plan.dims * plan.bits / 8 + ROW_BYTES) - existing)
    return round(needed)
