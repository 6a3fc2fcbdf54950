"""The summary that ends a run."""

from pathlib import Path

import pytest

from functa.flows.cli.tables import print_functaset, print_summary
from functa.storage.functaset.functaset import Functaset
from tests.helpers.flows.finished_stages import finish, ledger
from tests.helpers.storage.functasets import filled


@pytest.mark.parametrize(("psnr", "remark"), [(25.36, True), (28.81, False), (30.0, False)])
def test_a_psnr_below_patch_pca_is_remarked(
    psnr: float, remark: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = ledger(tmp_path)
    finish(book, "evaluate", psnr_test=psnr, psnr_pca_patch=28.81)
    print_summary(book, "done")
    assert ("PSNR is below patch PCA with as many numbers" in capsys.readouterr().out) is remark


def test_a_feature_space_has_the_name_that_it_has_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = ledger(tmp_path)
    figures = {"fd": {"latent": 2.0, "classifier": 4.0}, "fd_reconstruction": {"latent": 1.0, "classifier": 2.0}}
    finish(book, "evaluate", **figures, fd_noise={"latent": 9.0, "classifier": 9.0})
    print_summary(book, "done")
    words = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "Frechet distance, latents 2 (floor 1, ceiling 9)" in words
    assert "pixel-classifier" in words


@pytest.mark.parametrize(("measured", "expected"), [(None, "not measured"), (29.44, "29.44 dB, test")])
def test_a_quantised_functaset_shows_its_codes_apart_and_the_psnr_after_quantisation_where_it_is_known(
    measured: float | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = Functaset.open(filled(tmp_path / "s")).info()
    print_functaset("s", info, measured)
    words = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"PSNR after quantisation {expected}" in words
    assert f"Bytes {info['bytes']:,} codes {info['z_bytes']:,}" in words
    assert f"{info['bytes'] - info['z_bytes']:,}" in words
