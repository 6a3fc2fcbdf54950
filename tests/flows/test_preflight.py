"""Models that do not fit the latent are told before a server is started."""

import pytest

from flows.config import ConfigError, load_config
from flows.preflight import preflight


@pytest.mark.parametrize(
    ("setting", "stage", "said"),
    [
        (
            "classifier.model.token_channels=3",
            "train_classifier",
            "classifier.model.token_channels: a position's 8 numbers cannot be cut into tokens of 3",
        ),
        (
            "diffusion.model.attention=[3]",
            "train_diffusion",
            "diffusion.model.attention: resolution 3 is no level of this UNet: choose among 2",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_latent_is_one_line(setting: str, stage: str, said: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = load_config("digits", [setting])
    for asked in (stage, "pipeline"):
        with pytest.raises(ConfigError, match=said) as caught:
            preflight(config, str(tmp_path), asked)
        assert "\n" not in str(caught.value)
    preflight(config, str(tmp_path), "encode")  # which does not need it
