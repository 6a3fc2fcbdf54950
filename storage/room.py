"""How much room planned shards will take."""

from collections.abc import Sequence

from storage.locations import Location
from storage.plans import Plan

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
