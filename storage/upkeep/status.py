"""Progress of encoding, from plans, receipts and the newest commit alone."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.fragment import Fragment, Shard
from functa.storage.functaset.history import Commit, FragmentEntry, latest
from functa.storage.functaset.receipt import Receipt
from functa.storage.places.location import Location

READ_THREADS = 16  # over a network one receipt takes as long as many


def status(location: Location, ended: bool = False) -> dict[str, Any]:
    """Return shards done and left, images, bad ones, rows written, seconds of work, and `damage`, a line a record.

    `images` counts the rows that the newest version shows and, while encoding, those written beside it. The shards are
    those of the newest version and, unless encoding has ended, of what is planned beside it. Trusts the receipts.
    """
    damage: list[str] = []
    newest = _newest(location, damage)
    shown = {} if newest is None else {entry.fragment: entry for entry in newest.fragments}
    names = [key.split("/")[1] for key in location.list("fragments/") if key.split("/")[2:] == ["plan.json"]]
    retired = {*newest.retired_fragments} if newest else set()
    beside = {*names} - retired if newest is None or not ended else set()
    fragments = _fragments(location, sorted({*shown} | beside), shown, damage)
    receipts = _receipts([shard for fragment in fragments for shard in fragment.shards])
    damage += [str(found) for found in receipts.values() if isinstance(found, StorageError)]
    lost = [shard for shard, found in receipts.items() if found is None and shard.fragment.entry is not None]
    damage += [f"{location.uri}/{shard.receipt_key}: is missing" for shard in lost if not shard.retired.all()]
    finished = {shard: found for shard, found in receipts.items() if isinstance(found, Receipt)}
    new = [receipt for shard, receipt in finished.items() if shard.fragment.id not in shown]
    bad = sum(entry.bad for entry in shown.values()) + sum(len(receipt.bad) for receipt in new)  # less those retired
    images = sum(entry.rows for entry in shown.values()) + sum(receipt.good for receipt in new)
    return {
        "done": len(finished),
        "left": len(receipts) - len(finished),
        "images": images,
        "bad": bad,
        "rows": sum(receipt.rows for receipt in finished.values()),
        "seconds": sum(receipt.seconds for receipt in finished.values()),
        "damage": damage,
    }


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


def _receipts(shards: Sequence[Shard]) -> dict[Shard, Receipt | DamagedObject | None]:
    """Return each shard's receipt, None where there is none yet, or what is wrong with it."""

    def read(shard: Shard) -> Receipt | DamagedObject | None:
        try:
            return shard.find_receipt()
        except DamagedObject as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return dict(zip(shards, pool.map(read, shards), strict=True))


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
