"""How far encoding has come, from receipts alone."""

from collections.abc import Iterable

from storage.fragments import read_receipt
from storage.locations import Location
from storage.plans import load_plan


def status(location: Location) -> dict[str, float]:
    """Over all plans: shards done and left, rows bad and written, seconds of work. Cheap; trusts the receipts."""
    totals = {"done": 0.0, "left": 0.0, "bad": 0.0, "rows": 0.0, "seconds": 0.0}
    for key in location.list("fragments/"):
        parts = key.split("/")
        if parts[2:] != ["plan.json"]:
            continue
        plan = load_plan(location, parts[1])
        receipts = [read_receipt(location, plan, shard) for shard in range(plan.shards)]
        finished = [receipt for receipt in receipts if receipt is not None]
        totals["done"] += len(finished)
        totals["left"] += plan.shards - len(finished)
        totals["bad"] += sum(len(receipt.bad) for receipt in finished)
        totals["rows"] += sum(receipt.rows for receipt in finished)
        totals["seconds"] += sum(receipt.seconds for receipt in finished)
    return {key: value if key == "seconds" else int(value) for key, value in totals.items()}


def written(location: Location, fragments: Iterable[str]) -> int:
    """Shards of these fragments that have a receipt. Lists names, reads nothing."""
    return sum(len(location.list(f"fragments/{fragment}/receipts/")) for fragment in fragments)
