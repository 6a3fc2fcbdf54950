"""`functa status`: what a root's records and receipts tell, with no server, while it grows, broken off, or damaged."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from functa.flows.cli.status import read_status
from functa.flows.config.load import load_config
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.history import latest
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.stage_records import read_record, write_record
from tests.flows.test_ledger import finish
from tests.helpers.storage.functasets import fill, filled, new_store, plan, write
from tests.helpers.storage.locations import Home, Prefix, new_bucket
from tests.storage.conftest import moto as moto

PROJECT = Path(__file__).parents[3]


@pytest.fixture(params=["folder", "moto"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """An empty place, on disk or on S3."""
    if request.param == "folder":
        yield tmp_path
        return
    with new_bucket(request.getfixturevalue("moto")) as name:
        yield Prefix(f"s3://{name}")


def begun(home: Home) -> tuple[Ledger, Location]:
    """A root whose field stands, and the place of its functaset."""
    book = Ledger(load_config("digits", ["classifier=null", "diffusion=null"]), str(home / "root"))
    finish(book, "meta_train")
    return book, open_location(str(home / "root" / "functaset.zarr"))


def told(book: Ledger) -> tuple[str, tuple[int, int, int]]:
    """State of the encoding; shards done and left, images bad."""
    status = read_status(book.root)
    shards = status["shards"]
    return status["stages"]["encode"], (shards["done"], shards["left"], shards["bad"])


def test_what_is_done_left_and_bad_is_told_while_it_grows_and_after(home: Home) -> None:
    book, place = begun(home)
    assert told(book) == ("not started", (0, 0, 0))
    with book.working("encode") as record:
        new_store(place.uri)
        first, test = plan(place), plan(place, "test", n=6)
        assert told(book) == ("running", (0, 4, 0))
        write(place, first, 0, bad={2: "is empty"}, seconds=0.5)
        assert told(book) == ("running", (1, 3, 1))
        assert read_status(book.root)["images_per_s"] == 16
        for shard in (1, 2):
            write(place, first, shard, seconds=0.5)
        write(place, test, 0)
        commit(place, [first.id, test.id])
        book.finish(record, "feed", {})
    assert told(book) == ("finished", (4, 0, 1))
    with book.working("encode"):  # once more, and again it comes along while it is looked at
        newcomers = plan(place, n=3, first=50)
        assert told(book) == ("running", (4, 1, 1))
        fill(place, [newcomers])
        assert told(book) == ("running", (5, 0, 1))


def test_bad_images_that_were_made_good_or_given_up_are_not_counted(home: Home) -> None:
    book, place = begun(home)
    with book.working("encode") as record:
        new_store(place.uri)
        first = plan(place)
        for shard in range(3):
            write(place, first, shard, bad={1: "is empty"})
        commit(place, [first.id])
        book.finish(record, "feed", {})
    assert told(book) == ("finished", (3, 0, 3))
    commit(place, [], {first.id: [1, 9]})  # as an encoding again does when it has them anew
    assert told(book) == ("finished", (3, 0, 1))
    plan(place, n=5, first=70)  # of a run that was given up for another
    assert told(book) == ("finished", (3, 0, 1))


def test_who_was_killed_at_it_is_interrupted(tmp_path: Path) -> None:
    book, _ = begun(tmp_path)
    code = (
        "import os, sys; from functa.flows.config.schema import load_config; from functa.flows.ledger import Ledger\n"
        "with Ledger(load_config('digits', ['classifier=null', 'diffusion=null']), sys.argv[1]).working('encode'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, book.root], cwd=PROJECT, check=False)
    assert told(book)[0] == "interrupted"
    record = read_record(book.location, "encode")
    assert record is not None
    assert record.state == "running"  # it could not say so itself
    write_record(book.location, record.model_copy(update={"owner": "elsewhere/1/2.00"}))
    assert told(book)[0] == "running"  # another machine's process cannot be asked


DAMAGED = {
    "a receipt": ("fragments/{fragment}/receipts/", (3, 1, 0)),
    "a plan": ("fragments/{fragment}/plan.json", (1, 0, 0)),
    "the newest commit": ("commits/00000001.json", (4, 0, 0)),
    "its own document": ("zarr.json", (4, 0, 0)),
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("how", ["cut", "garbled"])
def test_of_a_damaged_functaset_the_rest_is_told_and_the_damage_by_its_path(home: Home, what: str, how: str) -> None:
    book, _ = begun(home)
    with book.working("encode") as record:
        place = filled(book.output(record))
        book.finish(record, "feed", {})
    newest = latest(place)
    assert newest is not None
    prefix, counts = DAMAGED[what]
    fragment = max(newest.fragments, key=lambda entry: entry.rows).fragment
    key = next(key for key in place.list(prefix.format(fragment=fragment)) if key.endswith(".json"))
    data = place.read(key)
    place.write(key, data[: len(data) // 2] if how == "cut" else b"{}")
    assert told(book) == ("damaged", counts)
    damage = read_status(book.root)["damage"]
    assert any(key in line for line in damage), damage
    assert read_status(book.root)["stages"]["meta_train"] == "finished"


def test_a_garbled_stage_record_is_damage_of_that_stage(home: Home) -> None:
    book, _ = begun(home)
    book.location.write("stages/encode.json", b"{")
    status = read_status(book.root)
    assert status["stages"] == {"meta_train": "finished", "encode": "damaged", "evaluate": "not started"}
    assert "stages/encode.json" in status["damage"][0]


def test_a_root_in_which_nothing_was_begun_is_one_line(home: Home) -> None:
    with pytest.raises(StorageError, match="no run has been started there"):
        read_status(str(home / "nothing"))


def test_it_needs_no_server_and_loads_nothing_heavy(tmp_path: Path) -> None:
    book, _ = begun(tmp_path)
    with book.working("encode") as record:
        filled(book.output(record))
        book.finish(record, "feed", {})
    code = (
        "import sys; from functa.flows.cli.main import _guarded; status = _guarded(sys.argv[1:], False); "
        "assert not {'torch', 'prefect'} & set(sys.modules), 'something heavy was loaded'; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", book.root, "--json"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
        env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"},  # nobody listens there
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards"] == {"done": 4, "left": 0, "bad": 0}
