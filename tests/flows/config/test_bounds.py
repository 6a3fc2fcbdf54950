"""No setting asks for more than a machine could ever do: whoever may send parameters cannot stop it with one number."""

import pytest

from functa.flows.config.load import ConfigError, load_config
from functa.flows.config.reference import settings_reference

pytestmark = pytest.mark.attacks

ABSURD = "1000000000000"
# Settings whose large values ask for less work, or for no more than there is.
HARMLESS = {
    "images.classes": "must be the number that the images have",
    "images.limit": "at most the images that there are",
    "meta_train.patches_per_image": "at most the patches that there are",
    "diffusion.model.attention": "resolutions, of which the latent has few",
    "diffusion.process.clip": "a bound on values",
    "evaluation.fid.min_samples": "refuses smaller numbers of samples",
    "evaluation.perturbation.strengths": "added to values",
    "gate.max_fd": "a threshold",
    "gate.max_fd_latent": "a threshold",
    "gate.max_fd_wavelet": "a threshold",
    "gate.max_fd_efficientnet_lite0": "a threshold",
    "gate.max_fid": "a threshold",
}
HARMLESS_NAMES = {"clip_norm", "log_every", "checkpoint_seconds", "validate_every", "evaluate_every", "micro_batch"}

NUMBERS = {
    row.key: row.type for row in settings_reference()
    if ("integer" in row.type or "number" in row.type) and row.key.rpartition(".")[2] not in HARMLESS_NAMES
}  # fmt: skip


def test_there_are_settings_to_check() -> None:
    assert len(NUMBERS) > 100
    assert HARMLESS.keys() <= NUMBERS.keys()


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in HARMLESS])
def test_an_absurd_number_is_refused(key: str) -> None:
    number = f"[{ABSURD}, {ABSURD}]" if "list" in NUMBERS[key] else ABSURD
    with pytest.raises(ConfigError) as refused:
        load_config("digits", [f"{key}={number}"])
    assert "\n" not in str(refused.value)
