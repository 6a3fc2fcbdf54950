"""Model card and data card: the hub reads their metadata, and names from others are no markup in them."""

import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from functa.storage.places.address import open_location
from functa.tasks.report.publish.cards import About, data_card, model_card
from tests.helpers.old_root import extract_old_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_old_root(tmp_path_factory.mktemp("cards")) / "root"


def about(kind: str = "root") -> About:
    return About("digits-functa", "hf://lab/digits-functa", "CC-BY-4.0", kind)  # type: ignore[arg-type]


def test_the_hub_reads_licence_and_figures_of_a_model_card(root: Path) -> None:
    card = ModelCard(model_card(about(), open_location(str(root))).decode())
    metrics = json.loads((root / "metrics.json").read_text())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        "psnr": pytest.approx(metrics["psnr_test"], abs=1e-4),
        "accuracy": pytest.approx(metrics["top1_test"], abs=1e-4),
        "frechet_distance": pytest.approx(metrics["fd"]["classifier"], abs=1e-4),
    }  # fmt: skip
    assert {result.dataset_name for result in card.data.eval_results} == {"digits"}
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "functa"
    for heading in ("Use", "Intended use", "Limits", "Figures", "Provenance", "Licence"):
        assert f"\n## {heading}\n" in card.text
    assert "functa fetch hf://lab/digits-functa --to model" in card.text
    for stage in ("meta_train", "encode", "train_diffusion"):
        digest = json.loads((root / f"stages/{stage}.json").read_text())["output_digest"]
        assert f"| {digest} |" in card.text


def test_a_model_card_shows_that_its_figures_are_of_an_earlier_state(root: Path) -> None:
    text = model_card(about(), open_location(str(root))).decode()
    record = root / "stages/encode.json"
    before = record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"output_digest": "0" * 24}))
    changed = model_card(about(), open_location(str(root))).decode()
    record.write_text(before)
    words = "The figures are of an earlier state"
    assert words in changed
    assert words not in text


def test_the_hub_reads_a_data_card(root: Path) -> None:
    places = {"functaset.zarr": open_location(str(root / "functaset.zarr"))}
    card = DatasetCard(data_card(about(), places, [str(number) for number in range(10)]).decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    assert "| train | 200 | 15.36 dB |" in card.text
    assert "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in card.text


@pytest.mark.attacks
def test_names_from_others_are_no_markup(root: Path) -> None:
    places = {"functaset.zarr": open_location(str(root / "functaset.zarr"))}
    names = ["<script>", "a | b", "[link](http://evil.example)", "![x](y)", "two\nlines"]
    text = data_card(about(), places, names).decode()
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\\[link\\](http" in text
    assert "a \\| b" in text
    assert "two\\\\nlines" in text
