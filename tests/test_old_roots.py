"""A root that version 0.1.0 wrote opens and works: nobody has to train or encode again after an update."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.flows.command import here
from tests.helpers.old_root import extract_old_root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old root, and beside it what version 0.1.0 answered."""
    return extract_old_root(tmp_path_factory.mktemp("old"))


def answer(*arguments: str | Path) -> str:
    done = here(*map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def assert_same_images(found: Path, expected: Path) -> None:
    """Equal to within one grey level: another machine's arithmetic may round the other way."""
    found_images, expected_images = images(found), images(expected)
    assert found_images.keys() == expected_images.keys()
    assert expected_images
    for name, image in expected_images.items():
        assert found_images[name].shape == image.shape
        assert np.abs(found_images[name] - image).max() <= 1, name


@pytest.mark.faults
def test_every_stage_of_an_old_root_is_up_to_date(folder: Path) -> None:
    status = json.loads(answer("status", folder / "root", "--json"))
    assert set(status["stages"].values()) == {"finished"}
    assert status["shards"]["left"] == status["shards"]["bad"] == 0


def test_an_old_functaset_is_whole(folder: Path) -> None:
    verified = json.loads(answer("store", "verify", folder / "root" / "functaset.zarr", "--deep", "--json"))
    assert verified["checked"] > 0
    assert verified["bad"] == []


def test_an_old_functaset_is_described_as_before(folder: Path) -> None:
    expected = json.loads((folder / "expected" / "info.json").read_text())
    found = json.loads(answer("store", "info", folder / "root", "--json"))
    assert {key: found[key] for key in expected} == expected  # newer versions add keys


@pytest.mark.faults
def test_old_latents_decode_to_the_same_images(folder: Path, tmp_path: Path) -> None:
    answer("decode", folder / "root" / "functaset.zarr", "--rows", "0:8", "--split", "test", "--out", tmp_path)
    assert_same_images(tmp_path, folder / "expected" / "decoded")


def test_an_old_diffusion_model_draws_the_same_samples(folder: Path, tmp_path: Path) -> None:
    answer("sample", folder / "root", "--count", "4", "--seed", "3", "--label", "2", "--out", tmp_path)
    assert_same_images(tmp_path, folder / "expected" / "samples")


def test_an_old_classifier_gives_the_same_classes(folder: Path) -> None:
    expected = json.loads((folder / "expected" / "classes.json").read_text())
    found = json.loads(answer("classify", folder / "root", folder / "expected" / "decoded", "--json"))
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    probabilities = [[row["probability"] for row in rows] for rows in (found, expected)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=2e-4)  # they are rounded to four digits


def test_a_run_of_an_old_roots_own_config_has_nothing_to_do(folder: Path) -> None:
    root = folder / "root"
    (config,) = root.glob("runs/*/config.yaml")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert "nothing to do" in answer("run", config, "--root", root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
