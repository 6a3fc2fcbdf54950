"""How far encoding has come, from plans, receipts and the newest commit alone."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from functa.storage.errors import DamagedObject, MissingObject, StorageError
from functa.storage.functaset.history import Commit, latest
from functa.storage.functaset.plan import Plan, load_plan
from functa.storage.functaset.shard import Receipt, read_receipt
from functa.storage.places.location import Location

READ_THREADS = 16  # over a network one receipt takes as long as many


def status(location: Location, ended: bool = False) -> dict[str, Any]:
    """Shards done and left, images bad, rows written, seconds of work, and `damage`, a line for each damaged record.

    Of what the newest version shows and, unless encoding has ended, of what is planned beside it. Trusts the receipts.
    """
    damage: list[str] = []
    newest = _newest(location, damage)
    shown = {} if newest is None else {entry.fragment: entry for entry in newest.fragments}
    names = [key.split("/")[1] for key in location.list("fragments/") if key.split("/")[2:] == ["plan.json"]]
    beside = {*names} - {*(newest.withdrawn if newest else ())} if newest is None or not ended else set()
    plans = _plans(location, sorted({*shown} | beside), {*shown}, damage)
    receipts = _receipts(location, plans)
    damage += [str(found) for found in receipts.values() if isinstance(found, StorageError)]
    finished = {place: found for place, found in receipts.items() if isinstance(found, Receipt)}
    bad = sum(entry.bad for entry in shown.values())  # those that are retired have been made good, or are gone
    bad += sum(len(receipt.bad) for (fragment, _), receipt in finished.items() if fragment not in shown)
    return {
        "done": len(finished),
        "left": len(receipts) - len(finished),
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


def _plans(location: Location, names: Sequence[str], shown: set[str], damage: list[str]) -> list[Plan]:
    plans = []
    for name in names:
        try:
            plans.append(load_plan(location, name))
        except DamagedObject as error:
            damage.append(str(error))
        except MissingObject as error:  # of others gc may have taken it since the listing
            damage += [str(error)] if name in shown else []
    return plans


def _receipts(location: Location, plans: Sequence[Plan]) -> dict[tuple[str, int], Receipt | DamagedObject | None]:
    """(fragment, shard) -> its receipt, None where there is none yet, or what is wrong with it."""
    places = [(plan, shard) for plan in plans for shard in range(plan.shards)]

    def read(place: tuple[Plan, int]) -> Receipt | DamagedObject | None:
        try:
            return read_receipt(location, *place)
        except DamagedObject as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = list(pool.map(read, places))
    return {(plan.id, shard): receipt for (plan, shard), receipt in zip(places, found, strict=True)}


def written(location: Location, fragments: Iterable[str]) -> int:
    """Shards of these fragments that have a receipt. Lists names, reads nothing."""
    return sum(len(location.list(f"fragments/{fragment}/receipts/")) for fragment in fragments)


ROW_BYTES = 60  # of a row's label, id, PSNR, augmentation and sha256, beside its latent


def bytes_left(location: Location, plans: Sequence[Plan]) -> int:
    """Bytes that the plans' shards will take, with a tenth to spare, less what already stands of them."""
    if location.free_bytes() is None:
        return 0  # nobody to compare it with: spare the listing
    needed = 0.0
    for each in plans:
        bits = each.quantization.bits if each.quantization else 32
        planned = {f"{each.path}/{key}" for key in (*each.objects, "plan.json")}
        standing = sum(entry.size for entry in location.entries(f"{each.path}/") if entry.key not in planned)
        needed += max(0.0, 1.1 * each.rows * (each.dims * bits / 8 + ROW_BYTES) - standing)
    return round(needed)
