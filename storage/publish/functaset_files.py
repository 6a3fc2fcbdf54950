"""The objects of a functaset that an export holds: those that its versions name, and nothing else that lies there."""

from functa.storage.errors import StorageError
from functa.storage.functaset.history import latest
from functa.storage.places.location import Location
from functa.storage.upkeep.gc import COMMITS, NUMBERS, collect
from functa.storage.upkeep.verify import verify

NAMED = 3  # bad objects, in an error's message


def functaset_files(location: Location) -> list[str]:
    """Return the keys of a functaset's objects.

    Leftovers, unfinished fragments and files of others are left out. Raises StorageError: nothing committed, or bytes
    of retired rows are there, which would be published with the others.
    """
    newest = latest(location)
    if newest is None:
        raise StorageError(f"{location.uri}: nothing is committed yet; finish encoding first")
    unneeded = collect(location, older_than=0, erase_retired=True)
    if unneeded.rewritten or unneeded.versions:
        raise StorageError(
            f"{location.uri}: still has bytes of rows that are no longer shown, which would be published too; erase "
            f"them first: functa store gc {location.uri} --delete --erase-retired"
        )
    left_out = {*unneeded.removed, *unneeded.unknown, *unneeded.young}

    def is_ours(key: str) -> bool:
        later = COMMITS.fullmatch(key) or NUMBERS.fullmatch(key)
        if later and int(key.rpartition("/")[2].partition(".")[0]) > newest.version:
            return False  # committed meanwhile
        return key not in left_out and "/".join(key.split("/")[:2]) not in left_out

    return [key for key in location.list() if is_ours(key)]


def check_whole(location: Location) -> None:
    """Read every object of a functaset. Raises StorageError, naming the first bad ones."""
    bad = verify(location, deep=True).bad
    if bad:
        named = "; ".join(f"{each['path']} {each['fault']}" for each in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise StorageError(
            f"{location.uri}: does not verify, so nothing was exported ({named}{more}); repair it first: "
            f"functa encode PRESET --repair, or restore it from a copy"
        )
