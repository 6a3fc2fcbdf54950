"""range=auto: the range with the best reconstructions of images that did not set it, with limited clipping."""

import numpy as np
import pytest
import torch

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop
from functa.models.measures.metrics import psnr_of_errors
from functa.storage.config import QuantizationConfig
from functa.storage.errors import StorageError
from functa.storage.functaset.quantizer import Quantizer, calibrate
from functa.tasks.encoding.quantizer_choice import CANDIDATES, choose_quantizer

AUTO = QuantizationConfig(bits=5, range="auto", granularity="channel")


@pytest.fixture(scope="module")
def loop() -> InnerLoop:
    torch.manual_seed(0)
    inner = InnerConfig()
    return InnerLoop(Field(FieldConfig(spatial=2, channels=4, width=16, depth=3), inner, 1), inner, (8, 8))


def heavy_tailed(n: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(4, (n, 2, 2, 4)).astype(np.float32)) * 0.05


def images_of(loop: InnerLoop, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loop.field(z, (8, 8))


def chosen_of(quantizer: Quantizer) -> str:
    """Return the candidate with the quantiser's policy."""
    words = quantizer.policy.removeprefix("auto: ").split(",")[0]
    if words.startswith("minmax"):
        return "minmax"
    return f"quantile {float(words.split()[1])}" if words.startswith("quantiles") else f"sigma {words.split()[2]}"


def test_the_best_range_on_held_out_images_is_chosen_and_all_are_recorded(loop: InnerLoop) -> None:
    z = heavy_tailed(600)
    pixels = images_of(loop, z)
    quantizer = choose_quantizer(AUTO, loop, z, lambda rows: pixels[rows])
    assert quantizer is not None
    assert quantizer.candidates.keys() == CANDIDATES.keys()
    name = chosen_of(quantizer)
    within = {k: t["psnr"] for k, t in quantizer.candidates.items() if t["clip_fraction"] <= 0.005}
    assert within[name] == max(within.values())
    fresh = heavy_tailed(400, seed=1)

    def psnr(changes: str) -> float:
        other = calibrate(AUTO.model_copy(update=dict(CANDIDATES[changes])), z.numpy())
        assert other is not None
        decoded = torch.from_numpy(other.decode(other.encode(fresh.numpy())[0]))
        return (
            psnr_of_errors((images_of(loop, decoded) - images_of(loop, fresh)).square().mean((1, 2, 3))).mean().item()
        )

    assert psnr(name) > psnr("minmax") + 0.5  # minmax wastes bins on a heavy tail
    assert psnr(name) >= max(psnr(other) for other in within) - 0.3
    again = choose_quantizer(AUTO, loop, z, lambda rows: pixels[rows])
    assert again is not None
    np.testing.assert_array_equal(again.low, quantizer.low)
    assert again.candidates == quantizer.candidates


def test_ranges_of_few_images_that_clip_others_are_excluded(loop: InnerLoop) -> None:
    """Per element of 12 images, minmax clips none of them and many values of others."""
    z = heavy_tailed(12)
    config = AUTO.model_copy(update={"granularity": "element", "bits": 8})
    quantizer = choose_quantizer(config, loop, z, lambda rows: images_of(loop, z)[rows])
    assert quantizer is not None
    assert quantizer.candidates["minmax"]["clip_fraction"] > 0.02
    assert "sd" in quantizer.policy


def test_if_all_ranges_clip_too_much_the_one_that_clips_least_is_chosen(loop: InnerLoop) -> None:
    z = heavy_tailed(12)
    config = AUTO.model_copy(update={"granularity": "element", "max_clip_fraction": 0.0})
    quantizer = choose_quantizer(config, loop, z, lambda rows: images_of(loop, z)[rows])
    assert quantizer is not None
    least = min(each["clip_fraction"] for each in quantizer.candidates.values())
    assert quantizer.candidates[chosen_of(quantizer)]["clip_fraction"] == least


def test_one_image_is_too_few_and_a_fixed_range_is_not_compared(loop: InnerLoop) -> None:
    z = heavy_tailed(1)
    with pytest.raises(StorageError, match="two calibration images"):
        choose_quantizer(AUTO, loop, z, lambda rows: images_of(loop, z)[rows])
    plain = choose_quantizer(AUTO.model_copy(update={"range": "minmax"}), loop, z, lambda rows: z)
    assert plain is not None
    assert plain.candidates == {}
    assert choose_quantizer(AUTO.model_copy(update={"bits": 32}), loop, z, lambda rows: z) is None
