"""Write shards onto a real file system of 2 MB that fills up, turns read-only, or belongs to somebody else.

Run inside a mount namespace of its own; prints the message of each fault, one line each:
unshare --map-root-user --mount python -m tests.helpers.storage.full_disk FOLDER
"""

import os
import subprocess
import sys
from pathlib import Path

from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.functaset import Functaset
from functa.storage.functaset.plan import Plan
from functa.storage.places.location import Location
from functa.storage.upkeep.verify import verify
from tests.helpers.storage.functasets import fill, new_store, plan, tree, write

MEGABYTE = 1 << 20


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def refused(place: Location, each: Plan, shard: int) -> str:
    try:
        write(place, each, shard)
    except StorageError as error:
        return str(error)
    raise AssertionError("was written")


def main(folder: Path) -> None:
    disk, reference = folder / "disk", new_store(folder / "reference")
    fill(reference, [plan(reference)])
    disk.mkdir()
    mount(disk, "size=2m")
    place = new_store(disk / "s")
    each = plan(place)
    write(place, each, 0)
    before = tree(disk / "s")

    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    print(refused(place, each, 1))
    assert not list(disk.rglob("*.partial")), "half-written files stay"
    assert {k: v for k, v in tree(disk / "s").items() if k in before} == before
    try:
        place.preflight_write(1)
    except StorageError as error:
        print(error)
    ballast.unlink()

    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    print(refused(place, each, 1))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)

    for shard in range(each.shards):
        write(place, each, shard)
    commit(place, [each.id])
    assert tree(disk / "s") == tree(folder / "reference")
    assert verify(place, deep=True).bad == []
    assert len(Functaset.open(place).load("train")) == 20
    try:
        place.preflight_write(10 * MEGABYTE)
    except StorageError as error:
        print(error)


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]))
