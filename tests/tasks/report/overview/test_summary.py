"""The first screen of a report: what was done, in one sentence, and warnings where images were few."""

import dataclasses

import pytest

from functa.tasks.report.blocks import ReportData
from functa.tasks.report.overview.summary import summary, title, warnings


@pytest.fixture
def run(full: ReportData) -> ReportData:
    return dataclasses.replace(
        full,
        config={"field": {"spatial": 2, "channels": 8, "axes": 2}, "inner": {"steps": 3}},
        images_by_split={"train": 1497, "test": 300},
        classes=[str(n) for n in range(10)],
    )


def test_the_first_sentence_names_images_numbers_and_steps(run: ReportData) -> None:
    assert summary(run).startswith(
        "1,797 images of 8\u00d78 pixels (64 values each) were each encoded into 2\u00d72\u00d78 = 32 numbers by 3 "
        "gradient steps through one shared neural field. Decoded again, the 300 test images reach a mean PSNR of "
        "30.8 dB."
    )


def test_nothing_is_claimed_of_a_run_without_pictures(run: ReportData) -> None:
    assert summary(dataclasses.replace(run, originals=None)) == ""


def test_each_model_trained_on_few_images_has_a_warning(run: ReportData) -> None:
    assert warnings(run) == ()
    few = dataclasses.replace(
        run, images_by_split={"train": 83, "test": 17}, curves=run.curves | {"train_diffusion": []}
    )
    text = " ".join(warnings(few))
    for part in ("field was trained on 83", "diffusion model was trained on 83", "8 images a class", "17 test images"):
        assert part in text, part
    alone = dataclasses.replace(few, curves={"meta_train": []})
    assert "diffusion" not in " ".join(warnings(alone)) and "classifier" not in " ".join(warnings(alone))


def test_an_accuracy_is_mentioned_only_where_there_is_one(run: ReportData) -> None:
    few = dataclasses.replace(run, images_by_split={"train": 1497, "test": 6})
    assert warnings(few) == ("6 test images: one image more or less right changes the accuracy by 16.7%.",)
    without = dataclasses.replace(few, metrics={"psnr_test": 30.0})
    assert [line for line in warnings(without) if "6 test images" in line and "accuracy" not in line] == [
        warnings(without)[0]
    ]


def test_the_title_names_the_users_data() -> None:
    assert title({"name": "cifar10_quick", "images": {"source": "folder", "location": "/x/photos/"}}) == (
        "photos (cifar10_quick)"
    )
    assert title({"name": "digits", "images": {"source": "digits", "location": ""}}) == "digits"
