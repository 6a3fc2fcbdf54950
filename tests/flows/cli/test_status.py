"""`functa status` of a root that grows, was interrupted or is damaged, from its records and receipts alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from functa.flows.cli.status import print_status, read_status
from functa.flows.config.load import load_config
from functa.flows.ledger import Ledger
from functa.storage.errors import StorageError
from functa.storage.functaset.commit import commit
from functa.storage.functaset.history import latest
from functa.storage.functaset.plan import Plan
from functa.storage.places.address import open_location
from functa.storage.places.location import Location
from functa.storage.runs.checkpoints import save_checkpoint
from functa.storage.runs.stage_records import read_record, write_record
from tests.helpers.flows.finished_stages import finish, finish_all
from tests.helpers.storage.functasets import fill, filled, new_store, plan, write
from tests.helpers.storage.locations import Home, Prefix, new_bucket

PROJECT = Path(__file__).parents[3]


@pytest.fixture(params=["folder", pytest.param("moto", marks=pytest.mark.slow)])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """Yield an empty location, on disk or on S3."""
    if request.param == "folder":
        yield tmp_path
        return
    with new_bucket(request.getfixturevalue("moto")) as name:
        yield Prefix(f"s3://{name}")


def begun(home: Home) -> tuple[Ledger, Location]:
    """Return a root whose field is trained, and the location of its functaset."""
    book = Ledger(load_config("digits", ["classifier=null", "diffusion=null"]), str(home / "root"))
    finish(book, "meta_train")
    return book, open_location(str(home / "root" / "functaset.zarr"))


def encoded_with_bad_images(home: Home, **figures: float) -> tuple[Ledger, Location, Plan]:
    """Return a root whose encoding has finished, its functaset, and its fragment of 3 shards with a bad image each."""
    book, place = begun(home)
    with book.working("encode") as record:
        new_store(place.uri)
        first = plan(place)
        for shard in range(3):
            write(place, first, shard, bad={1: "is empty"})
        commit(place, [first.id])
        book.finish(record, "feed", figures)
    return book, place, first


def encoding_state(book: Ledger) -> tuple[str, tuple[int, int, int]]:
    """Return the state of the encoding; shards done and left, images bad."""
    status = read_status(book.root)
    shards = status["shards"]
    return status["stages"]["encode"], (shards["done"], shards["left"], shards["bad"])


def test_done_left_and_bad_are_counted_during_encoding_and_after(home: Home) -> None:
    book, place = begun(home)
    assert encoding_state(book) == ("not started", (0, 0, 0))
    with book.working("encode") as record:
        new_store(place.uri)
        first, test = plan(place), plan(place, "test", n=6)
        assert encoding_state(book) == ("running", (0, 4, 0))
        write(place, first, 0, bad={2: "is empty"}, seconds=0.5)
        assert encoding_state(book) == ("running", (1, 3, 1))
        assert read_status(book.root)["images_per_s"] == 16
        for shard in (1, 2):
            write(place, first, shard, seconds=0.5)
        write(place, test, 0)
        commit(place, [first.id, test.id])
        book.finish(record, "feed", {})
    assert encoding_state(book) == ("finished", (4, 0, 1))
    with book.working("encode"):
        newcomers = plan(place, n=3, first=50)
        assert encoding_state(book) == ("running", (4, 1, 1))
        fill(place, [newcomers])
        assert encoding_state(book) == ("running", (5, 0, 1))


def test_bad_images_that_were_replaced_or_abandoned_are_not_counted(home: Home) -> None:
    book, place, first = encoded_with_bad_images(home)
    assert encoding_state(book) == ("finished", (3, 0, 3))
    commit(place, [], {first.id: [1, 9]})  # as another encoding does when it can read them
    assert encoding_state(book) == ("finished", (3, 0, 1))
    plan(place, n=5, first=70)  # of a run that another replaced
    assert encoding_state(book) == ("finished", (3, 0, 1))


def test_only_visible_images_are_counted_and_the_rate_is_that_of_the_metrics(home: Home) -> None:
    book, place, first = encoded_with_bad_images(home, encode_images_per_s=7.5)
    made = commit(place, [], {first.id: [0, 1]})  # a good row and a bad one are retired
    found = read_status(book.root)
    assert found["images"] == sum(entry.rows for entry in made.fragments) == 20 - 1 - 3
    assert found["shards"]["bad"] == 2
    assert found["images_per_s"] == 7.5


def test_an_unfinished_training_shows_its_last_checkpoint_and_the_command_that_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = Ledger(load_config("digits", ["classifier=null"]), str(tmp_path / "root"))
    with pytest.raises(ValueError), book.working("meta_train") as record:
        assert read_status(book.root)["steps"] == {"meta_train": [0, 700]}
        assert read_status(book.root)["command"] == ""  # it is running
        save_checkpoint(book.location.child(*record.output.split("/")), 340, {"w": np.zeros(2)}, {})
        raise ValueError("loss is not finite")
    found = read_status(book.root)
    assert found["steps"] == {"meta_train": [340, 700]}
    assert found["report"] is None
    assert found["command"] == f"functa run digits --set classifier=null --root {book.root}"
    print_status(book.root, found)
    printed = capsys.readouterr().out
    assert "failed, last checkpoint at step 340 of 700" in printed and f"Next: {found['command']}" in printed


def test_a_report_of_an_earlier_functaset_is_marked_with_the_command_that_updates_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = finish_all(tmp_path)
    found = read_status(book.root)
    assert (found["outdated"], found["command"]) == ([], "")
    assert found["report"] == f"{book.root}/report.html"
    finish(book, "encode", "more")
    found = read_status(book.root)
    assert found["stages"]["evaluate"] == "finished" and found["outdated"] == ["functaset"]
    assert found["command"] == f"functa evaluate digits --root {book.root}"
    print_status(book.root, found)
    assert "The report is of an earlier version of: functaset." in capsys.readouterr().out


def test_a_stage_whose_process_was_killed_is_interrupted(tmp_path: Path) -> None:
    book, _ = begun(tmp_path)
    code = (
        "import os, sys; from functa.flows.config.load import load_config; from functa.flows.ledger import Ledger\n"
        "with Ledger(load_config('digits', ['classifier=null', 'diffusion=null']), sys.argv[1]).working('encode'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, book.root], cwd=PROJECT, check=False)
    assert encoding_state(book)[0] == "interrupted"
    record = read_record(book.location, "encode")
    assert record is not None
    assert record.state == "running"  # the killed process could not write it
    write_record(book.location, record.model_copy(update={"owner": "elsewhere/1/2.00"}))
    assert encoding_state(book)[0] == "running"  # another machine's process cannot be asked


DAMAGED = {
    "a manifest": ("fragments/{fragment}/manifest", (4, 0, 0)),
    "a plan": ("fragments/{fragment}/plan.json", (1, 0, 0)),
    "the newest commit": ("commits/00000001.json", (4, 0, 0)),
    "its own document": ("zarr.json", (4, 0, 0)),
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("how", ["cut", "garbled"])
def test_damage_is_reported_by_its_path_and_the_rest_as_it_is(home: Home, what: str, how: str) -> None:
    book, _ = begun(home)
    with book.working("encode") as record:
        place = filled(book.output(record))
        book.finish(record, "feed", {})
    newest = latest(place)
    assert newest is not None
    prefix, state = DAMAGED[what]
    fragment = max(newest.fragments, key=lambda entry: entry.rows).fragment
    key = next(key for key in place.list(prefix.format(fragment=fragment)) if not key.endswith(".sha256"))
    data = place.read(key)
    place.write(key, data[: len(data) // 2] if how == "cut" else b"{}")
    assert encoding_state(book) == ("damaged", state)
    damage = read_status(book.root)["damage"]
    assert any(key in line for line in damage), damage
    assert read_status(book.root)["stages"]["meta_train"] == "finished"


def test_a_garbled_stage_record_is_damage_of_that_stage(home: Home) -> None:
    book, _ = begun(home)
    book.location.write("stages/encode.json", b"{")
    status = read_status(book.root)
    assert status["stages"] == {"meta_train": "finished", "encode": "damaged", "evaluate": "not started"}
    assert "stages/encode.json" in status["damage"][0]


def test_a_root_without_any_run_is_one_line(home: Home) -> None:
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
        env=os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"},  # no server listens there
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards"] == {"done": 4, "left": 0, "bad": 0}


@pytest.mark.attacks
def test_images_are_printed_and_nothing_is_read_as_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book, _ = begun(tmp_path / "[bold]run")
    with book.working("encode") as record:
        filled(book.output(record))
        book.finish(record, "feed", {})
    print_status(book.root, read_status(book.root) | {"damage": ["[red]x: is short"]})
    printed = capsys.readouterr().out
    assert "Encoded: 26 images; 0 bad images" in printed
    assert "[bold]run" in printed.replace("\n", "")
    assert "Damaged: [red]x: is short" in printed
