"""`functa fields`, and `encode` and `decode` of a folder with a ready-made field: from the files to the pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from functa.tasks.inference.ready import shipped
from tests.helpers.flows.command import error_line, functa, here
from tests.helpers.tasks.ready_fields import CARD, write_photograph, write_ready


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped fields, with two of them."""
    monkeypatch.setattr(shipped, "FOLDER", str(tmp_path / "ready"))
    write_ready(tmp_path / "ready")
    write_ready(tmp_path / "ready", "grey_one", patch=8, image_channels=1)
    return tmp_path / "ready"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    write_photograph(tmp_path / "photographs" / "wide.jpg", 21, 34)
    write_photograph(tmp_path / "photographs" / "high.png", 34, 21)
    return tmp_path / "photographs"


def test_fields_are_listed_with_their_cards() -> None:
    lines = here("fields").stdout.splitlines()
    assert lines == [
        "grey_one: 8 numbers for each 8x8 grey pixels (64 values); dB 1.5",
        "tiny: 8 numbers for each 4x4 colour pixels (48 values); dB 1.5",
    ]
    described = json.loads(here("fields", "--json").stdout)
    assert [each["name"] for each in described] == ["grey_one", "tiny"]
    assert described[1].items() > CARD.items()
    assert (described[1]["patch"], described[1]["channels"], described[1]["image_channels"]) == (4, 8, 3)
    assert json.loads(here("fields", "tiny", "--json").stdout) == described[1]
    assert "licence: none" in here("fields", "tiny").stdout.splitlines()


def test_fields_are_listed_without_torch() -> None:
    done = functa("fields", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)


def test_a_folder_is_encoded_and_decoded(photographs: Path, tmp_path: Path) -> None:
    store, out = str(tmp_path / "store"), tmp_path / "out"
    options = ("encode", "--field", "tiny", "--images", str(photographs), "--out", store, "--bits", "8", "--steps", "4")
    done = here(*options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"2 images in {store}: PSNR ")
    assert "0 images" in here(*options).stdout and "2 were there" in here(*options).stdout
    assert here("decode", store, "--out", str(out), "--scale", "2").stdout == f"2 images in {out}\n"
    assert {path.name: Image.open(path).size for path in out.glob("*.png")} == {
        "wide.png": (68, 42), "high.png": (42, 68),
    }  # fmt: skip
    verified = json.loads(here("store", "verify", store, "--deep", "--json").stdout)
    assert verified["bad"] == [] and verified["checked"] > 30
    assert "holds 2 functasets" in error_line(here("store", "info", store), 1)
    info = json.loads(here("store", "info", f"{store}/34x21.zarr", "--json").stdout)
    assert (info["rows"], info["shape"], info["bits"]) == (1, [6, 9, 8], 8)
    next(Path(store).glob("34x21.zarr/fragments/*/z/c/*/*/*/*")).write_bytes(b"damaged")
    damaged = here("store", "verify", store, "--deep")
    assert damaged.returncode == 1 and damaged.stdout.startswith("34x21.zarr/fragments/")


@pytest.mark.parametrize(
    ("options", "status", "fault"),
    [
        (["--field", "tinny", "--images", "{photographs}", "--out", "{out}"], 2, "did you mean 'tiny'"),
        (["--field", "tiny", "--images", "{photographs}"], 2, "--field needs --out too"),
        (["--images", "{photographs}"], 2, "--images needs --field and --out too"),
        (["--bits", "8"], 2, "--bits needs --field and --images and --out too"),
        (["digits", "--field", "tiny"], 2, "PRESET and --field exclude each other"),
        (["--field", "tiny", "--set", "encode.steps=4"], 2, "--set and --field exclude each other"),
        (["--field", "tiny", "--retry-bad"], 2, "--retry-bad and --field exclude each other"),
        ([], 2, "encode needs PRESET, or --field, --images and --out"),
        (["--field", "grey_one", "--images", "{photographs}", "--out", "{out}"], 1, "is a colour image"),
        (["--field", "tiny", "--images", "nowhere", "--out", "{out}"], 1, "no such folder or file"),
        (["--field", "{photographs}", "--images", "{photographs}", "--out", "{out}"], 1, "no field has been trained"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_encoded_is_refused_in_one_line(
    photographs: Path, tmp_path: Path, options: list[str], status: int, fault: str
) -> None:
    places = {"photographs": photographs, "out": tmp_path / "store"}
    done = here("encode", *(option.format(**places) for option in options))
    assert fault in error_line(done, status)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())


def test_options_that_exclude_each_other_are_refused(photographs: Path, tmp_path: Path) -> None:
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    here("encode", "--field", "tiny", "--images", str(photographs), "--out", store)
    for option in (["--rows", "0:1"], ["--split", "test"], ["--resolution", "64"]):
        done = here("decode", store, "--out", out, *option)
        assert "these images have sizes of their own and are decoded whole" in error_line(done, 2)
    both = here("decode", store, "--out", out, "--scale", "2", "--resolution", "8")
    assert "--resolution and --scale exclude each other" in error_line(both, 2)


def test_a_damaged_field_is_refused(folder: Path, photographs: Path, tmp_path: Path) -> None:
    tensors = folder / "tiny.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    done = here("encode", "--field", "tiny", "--images", str(photographs), "--out", str(tmp_path / "store"))
    assert "was altered (its digest does not match tiny.json)" in error_line(done, 1)
    assert "was altered" in error_line(here("fields"), 1)
