"""A root that somebody else made: nothing outside it is read, written or deleted because its records name it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from functa.flows.ledger import Ledger
from functa.flows.sweep.plan import plan_sweep
from functa.flows.sweep.results import SweepState
from functa.storage.errors import StorageError
from functa.storage.functaset.functaset import Functaset
from functa.storage.places import reused
from functa.storage.places.address import open_location
from functa.storage.places.reused import NotReused, allow_reuse, output_of, refuse_link_out
from functa.storage.runs.stage_records import read_record
from functa.tasks.inference.open_models import load_classifier, load_field
from functa.tasks.report.compare.runs import read_runs
from tests.fuzz.test_records import sealed
from tests.helpers.flows.command import error_line, here
from tests.helpers.flows.finished_stages import finish, finish_all, ledger
from tests.helpers.old_root import extract_old_root
from tests.helpers.storage.functasets import tree

pytestmark = pytest.mark.attacks

OUTPUTS = {"meta_train": "checkpoints/field", "encode": "functaset.zarr", "train_classifier": "checkpoints/classifier",
           "train_diffusion": "checkpoints/diffusion"}  # fmt: skip


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other test's reuse count here."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(reused, "_allowed", set())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_old_root(tmp_path_factory.mktemp("old")) / "root"


@pytest.fixture
def roots(pristine: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A stranger's root, and one of the user's beside it."""
    for name in ("stranger", "own"):
        shutil.copytree(pristine, tmp_path / name)
    return tmp_path / "stranger", tmp_path / "own"


def edit(root: Path, stage: str, **values: object) -> None:
    path = root / "stages" / f"{stage}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def commands(root: Path, out: Path) -> dict[str, tuple[str, ...]]:
    return {
        "info": ("store", "info", str(root)),
        "verify": ("store", "verify", str(root)),
        "gc": ("store", "gc", str(root), "--delete", "--older-than", "0"),
        "retire": ("store", "retire", str(root), "digits/0000"),
        "quantize": ("store", "quantize", str(root), str(out / "q"), "--bits", "4"),
        "hydrate": ("store", "hydrate", str(root), "--to", str(out / "h")),
        "decode": ("decode", str(root), "--out", str(out / "d")),
        "sample": ("sample", str(root), "--count", "1", "--out", str(out / "s")),
        "classify": ("classify", str(root), str(out / "x.png")),
    }


@pytest.mark.parametrize(
    "name", ["info", "verify", "gc", "retire", "quantize", "hydrate", "decode", "sample", "classify"]
)
@pytest.mark.parametrize("how", ["absolute", "dots", "bucket"])
def test_no_command_follows_a_record_out_of_its_root(
    roots: tuple[Path, Path], tmp_path: Path, name: str, how: str
) -> None:
    stranger, own = roots
    above = {"absolute": f"{own}", "dots": "../own", "bucket": "s3://elsewhere"}[how]
    for stage, output in OUTPUTS.items():
        edit(stranger, stage, output=f"{above}/{output}")
    before = tree(own), tree(stranger)
    line = error_line(here(*commands(stranger, tmp_path)[name]), 1)
    assert "outside this root" in line or "not a relative key" in line or "only reads" in line
    assert (tree(own), tree(stranger)) == before
    assert not any((tmp_path / folder).exists() for folder in ("q", "h", "d", "s"))


def test_status_and_compare_name_the_record_and_read_nothing_outside(roots: tuple[Path, Path]) -> None:
    stranger, own = roots
    for stage, output in OUTPUTS.items():
        edit(stranger, stage, output=f"{own}/{output}")
    done = here("status", str(stranger), "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["stages"]["encode"] == "damaged"
    assert found["images"] == 0
    assert any("outside this root" in line for line in found["damage"])
    (run,) = read_runs([str(stranger)])
    assert run.curves == {}
    described = next(stranger.glob("runs/*/run.json"))
    described.write_text(json.dumps(json.loads(described.read_text()) | {
        "outputs": {stage: f"{own}/{output}" for stage, output in OUTPUTS.items()}}))  # fmt: skip
    shutil.rmtree(stranger / "stages")
    (run,) = read_runs([str(described.parent)])
    assert run.curves == {}
    described = next(own.glob("runs/*/run.json"))
    described.write_text(json.dumps(json.loads(described.read_text()) | {
        "outputs": {stage: f"{own}/{output}" for stage, output in OUTPUTS.items()}}))  # fmt: skip
    (run,) = read_runs([str(described.parent)])
    assert run.curves  # of its own root they are shown


def test_the_python_api_does_not_follow_a_record_out_of_its_root_either(roots: tuple[Path, Path]) -> None:
    stranger, own = roots
    for stage, output in OUTPUTS.items():
        edit(stranger, stage, output=f"{own}/{output}")
    opened: tuple[Callable[[str], object], ...] = (Functaset.open, load_field, load_classifier)
    for opens in opened:
        with pytest.raises(NotReused, match="outside this root"):
            opens(str(stranger))


@pytest.mark.parametrize("linked", ["functaset.zarr", "functaset.zarr/fragments", "functaset.zarr/commits"])
@pytest.mark.parametrize("name", ["gc", "retire"])
def test_nothing_is_deleted_or_written_through_a_link_out_of_the_root(
    roots: tuple[Path, Path], tmp_path: Path, linked: str, name: str
) -> None:
    stranger, own = roots
    for path in own.rglob("*"):
        os.utime(path, (0, 0))
    shutil.rmtree(stranger / linked)
    (stranger / linked).symlink_to(own / linked, target_is_directory=True)
    shutil.rmtree(own / "functaset.zarr" / "moments")  # gc would collect what no commit names
    (own / "functaset.zarr" / "moments").mkdir()
    (own / "functaset.zarr" / "moments" / ("0" * 24 + ".f8")).write_bytes(b"x")
    os.utime(own / "functaset.zarr" / "moments" / ("0" * 24 + ".f8"), (0, 0))
    before = tree(own)
    key = Functaset.open(str(own)).load("train").keys[0]
    asked = ("store", "retire", str(stranger), key) if name == "retire" else commands(stranger, tmp_path)[name]
    done = here(*asked)
    assert tree(own) == before
    if linked == "functaset.zarr" or done.returncode:
        assert "a symbolic link leads out" in error_line(done, 1)


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/field", "stages", "runs"])
def test_no_stage_is_written_through_a_link_out_of_the_root(tmp_path: Path, linked: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = tmp_path / "root" / linked
    path.parent.mkdir(parents=True)
    path.symlink_to(outside, target_is_directory=True)
    book = ledger(tmp_path / "root", "classifier=null", "diffusion=null")
    with pytest.raises(StorageError, match="a symbolic link leads out"):
        for stage in ("meta_train", "encode", "evaluate"):
            finish(book, stage)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("linked", ["members", "shared", "a member"])
def test_no_member_of_a_sweep_is_written_through_a_link_out_of_its_root(tmp_path: Path, linked: str) -> None:
    swept = plan_sweep("digits", [], ["classifier.steps=60,70"])
    name = swept.members[1].folder if linked == "a member" else linked
    (tmp_path / "outside").mkdir()
    (tmp_path / "sweep" / name).parent.mkdir(parents=True)
    (tmp_path / "sweep" / name).symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(StorageError, match="a symbolic link leads out"):
        SweepState(swept, str(tmp_path / "sweep"), ["psnr_test"], "")
    SweepState(swept, str(tmp_path / "other"), ["psnr_test"], "")


def test_a_link_inside_the_root_and_a_root_that_is_a_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "root").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "checkpoints").symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    refuse_link_out(open_location(str(tmp_path / "root")), "checkpoints/field")
    finish(ledger(tmp_path / "root"), "meta_train")
    assert list((tmp_path / "disk" / "real" / "field").iterdir())


def test_what_a_user_reuses_stays_readable_and_only_readable(tmp_path: Path) -> None:
    finish_all(tmp_path / "a")
    taken = ledger(tmp_path / "b", from_root=tmp_path / "a")
    assert taken.up_to_date("encode") is not None
    again = ledger(tmp_path / "b")  # without --from: this user let it in
    record = again.up_to_date("encode")
    assert record is not None
    assert again.output(record) == f"{tmp_path}/a/functaset.zarr"
    for name in ("gc", "retire"):
        assert "only reads" in error_line(here(*commands(tmp_path / "b", tmp_path)[name]), 1)


def test_another_user_names_the_root_that_is_reused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_all(tmp_path / "a")
    ledger(tmp_path / "b", from_root=tmp_path / "a").up_to_date("meta_train")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(reused, "_allowed", set())
    with pytest.raises(NotReused, match="--from"):
        ledger(tmp_path / "b").up_to_date("meta_train")
    assert ledger(tmp_path / "b", from_root=tmp_path / "a").up_to_date("meta_train") is not None
    assert ledger(tmp_path / "b").up_to_date("meta_train") is not None


def test_a_root_that_is_reused_lets_no_third_one_in(tmp_path: Path) -> None:
    finish_all(tmp_path / "victim")
    finish_all(tmp_path / "stranger")
    record = read_record(open_location(str(tmp_path / "stranger")), "meta_train")
    assert record is not None
    edit(tmp_path / "stranger", "meta_train", output=f"{tmp_path}/victim/checkpoints/field")
    with pytest.raises(NotReused):
        Ledger(ledger(tmp_path / "b").config, str(tmp_path / "b"), str(tmp_path / "stranger")).up_to_date("meta_train")


def test_reuse_is_remembered_for_this_pair_alone(tmp_path: Path) -> None:
    root, other = (open_location(str(tmp_path / name)) for name in ("r", "s"))
    allow_reuse(root, f"{tmp_path}/x/field")
    assert output_of(root, f"{tmp_path}/x/field").uri == f"{tmp_path}/x/field"
    for place, output in ((root, f"{tmp_path}/x"), (root, f"{tmp_path}/x/field2"), (other, f"{tmp_path}/x/field")):
        with pytest.raises(NotReused):
            output_of(place, output)
    allow_reuse(root, f"{tmp_path}/y/field", of=open_location(f"{tmp_path}/z"))  # not of the root that was named
    with pytest.raises(NotReused):
        output_of(root, f"{tmp_path}/y/field")


HOSTILE_KEYS = ["../../own/metrics.json", "/etc/passwd", "../" * 12 + "etc/passwd"]


@pytest.mark.parametrize("key", HOSTILE_KEYS)
@pytest.mark.parametrize("part", ["moments", "fragment", "objects", "retired"])
def test_keys_in_a_commit_do_not_leave_the_functaset(roots: tuple[Path, Path], key: str, part: str) -> None:
    stranger, own = roots
    store = stranger / "functaset.zarr"
    path = max(store.glob("commits/*.json"))
    commit = json.loads(path.read_text())
    if part == "moments":
        commit["moments"]["key"] = key
    elif part == "fragment":
        commit["fragments"][0]["fragment"] = key
    elif part == "retired":
        commit["withdrawn"] = [key]
    else:
        commit["objects"] = {key: commit["objects"]["zarr.json"]} | commit["objects"]
    path.write_text(json.dumps(sealed(commit)))
    path.with_suffix(".sha256").unlink()
    before = tree(own)
    for asked in (("verify",), ("gc", "--delete", "--older-than", "0")):
        done = here("store", asked[0], str(stranger), *asked[1:])
        assert "Traceback" not in done.stderr
        assert "root:" not in done.stdout + done.stderr  # /etc/passwd's first line
    assert tree(own) == before
    if part in ("moments", "fragment"):
        with pytest.raises(StorageError):
            functaset = Functaset.open(str(stranger))
            functaset.moments()
            functaset.load("train")
