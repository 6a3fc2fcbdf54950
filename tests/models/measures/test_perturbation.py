"""Effects of latent numbers on the image: real fields, and decoders for which the answer is known."""

import pytest
import torch
from torch import Tensor

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import patchify, unpatchify
from functa.models.measures.perturbation import (
    Decode,
    agreement,
    channel_effects,
    entry_effects,
    even_share,
    linear_fit,
    locality,
    reference_grid,
    squared_by_patch,
)

SIDE, S, C = 16, 4, 6
STRENGTHS = (-0.2, -0.1, 0.1, 0.2)


def real(**changes: object) -> tuple[Decode, Tensor]:
    """A field as it is initialised, with channels that differ in strength, and latents for it."""
    config = FieldConfig.model_validate({"spatial": S, "channels": C, "width": 16, "depth": 3} | changes)
    field = Field(config, InnerConfig(), 3, seed=3, resolution=(SIDE, SIDE)).requires_grad_(False)
    z = 0.05 * torch.randn(5, *config.latent_shape, generator=torch.Generator().manual_seed(0))
    return lambda z: field(z, (SIDE, SIDE)), z


def share(decode: Decode, z: Tensor) -> Tensor:
    sd = torch.full(z.shape[1:], 0.05)
    return locality(decode, z, sd, [0, 5, 15], torch.Generator().manual_seed(1))


@pytest.mark.parametrize("coordinates", ["patch", "global"])
def test_locality_is_exactly_one_for_nearest_interpolation_of_a_1x1_map(coordinates: str) -> None:
    shares = share(*real(coordinates=coordinates))
    assert shares.shape == (3, 5)
    assert (shares == 1).all()


@pytest.mark.parametrize(
    "changes",
    [{"interpolation": "bilinear"}, {"kernel": 3}, {"interpolation": "bilinear", "coordinates": "global", "kernel": 3}],
    ids=["bilinear", "3x3", "both"],
)
def test_locality_is_below_one_where_neighbours_see_each_other(changes: dict[str, object]) -> None:
    shares = share(*real(**changes))
    assert ((shares > 0) & (shares < 0.999)).all() and 0.1 < shares.mean() < 0.9


def test_a_vectors_entry_changes_every_patch() -> None:
    decode, z = real(spatial=1, channels=32)
    effects = entry_effects(decode, z, torch.full((1, 1, 32), 0.05), range(32), 4)
    assert effects.mae.shape == effects.largest_share.shape == (32, 5)
    assert (effects.largest_share > 1 / 16).all()  # the largest of 16 shares
    assert effects.largest_share.mean() < 0.3


def even(z: Tensor) -> Tensor:
    """A vector's entries as brightness: an even change of the image, twice as much for each entry as for the last."""
    return (z.flatten(1) @ 2.0 ** torch.arange(z.shape[-1]))[:, None, None, None].expand(-1, SIDE, SIDE, 3)


def test_entry_effects_of_a_known_decoder() -> None:
    effects = entry_effects(even, torch.zeros(2, 1, 1, 4), torch.tensor([[[1.0, 1, 1, 0.5]]]), [0, 1, 3], 4)
    torch.testing.assert_close(effects.mae, torch.tensor([1.0, 2, 4], dtype=torch.float64)[:, None].expand(-1, 2))
    torch.testing.assert_close(effects.largest_share, torch.full((3, 2), 1 / 16, dtype=torch.float64))


def linear(z: Tensor) -> Tensor:
    """Latents as coefficients of patterns, the same in every patch: what C.5 supposes spatial functa to be."""
    basis = torch.randn(C, 16 * 3, generator=torch.Generator().manual_seed(2)) * torch.arange(C)[:, None]
    return unpatchify((z.reshape(-1, C) @ basis).reshape(-1, 16, 3), S, (SIDE, SIDE))


def test_a_linear_decoder_is_linear_and_stable() -> None:
    z = torch.randn(3, S, S, C, generator=torch.Generator().manual_seed(4))
    effects = channel_effects(linear, z.double().float(), range(C), STRENGTHS, S)
    slope, r2 = linear_fit(torch.tensor(STRENGTHS), effects.rmse)
    patterns = linear(torch.eye(C)[:, None, None].expand(-1, S, S, -1))  # each channel alone, at strength 1
    torch.testing.assert_close(slope, patterns.double().square().mean((1, 2, 3)).sqrt(), rtol=1e-4, atol=1e-6)
    assert torch.isnan(torch.stack([r2[0], effects.between_patches[0], effects.between_images[0]])).all()  # is 0
    for figure in (r2[1:], effects.between_patches[1:], effects.between_images[1:]):
        torch.testing.assert_close(figure, torch.ones_like(figure), rtol=0, atol=1e-5)


def test_patterns_of_a_field_with_patch_coordinates_are_more_alike_than_with_global_ones() -> None:
    def stability(coordinates: str) -> float:
        decode, z = real(coordinates=coordinates)
        effects = channel_effects(decode, z, range(C), STRENGTHS, S)
        assert (effects.rmse > 0).all()
        return effects.between_patches.mean().item()

    assert stability("patch") > 0.5
    assert stability("patch") > stability("global") + 0.2


def test_a_curve_that_bends_is_not_linear() -> None:
    strengths = torch.tensor([-0.2, -0.1, 0.1, 0.2])
    slope, r2 = linear_fit(strengths, torch.stack([3 * strengths.abs(), strengths.square()]))
    torch.testing.assert_close(slope[0].item(), 3.0)
    assert r2[0] == pytest.approx(1) and 0.5 < r2[1] < 0.97


def test_agreement_is_the_mean_cosine_of_pairs() -> None:
    patterns = torch.randn(5, 7, dtype=torch.float64)
    cosines = [
        torch.cosine_similarity(patterns[i], patterns[j], dim=0) for i in range(5) for j in range(5) if i != j
    ]  # fmt: skip
    torch.testing.assert_close(agreement(patterns), torch.stack(cosines).mean())
    padded = torch.cat([patterns, torch.zeros(3, 7, dtype=torch.float64)])
    torch.testing.assert_close(agreement(padded), torch.stack(cosines).mean())
    assert agreement(torch.stack([patterns[0], -patterns[0]])).item() == pytest.approx(-1)
    assert torch.isnan(agreement(patterns[:1]))


def test_vectors_are_measured_on_patches_of_at_least_four_pixels() -> None:
    assert reference_grid((32, 32), 8) == 8
    assert reference_grid((8, 8), 8) == 4
    assert reference_grid((7, 7), 8) == 3
    assert reference_grid((3, 3), 8) == 1  # too small for two patches


@pytest.mark.parametrize("side", [31, 37])
def test_sides_that_nothing_divides_are_cut_into_patches_all_the_same(side: int) -> None:
    """Sides of patches differ by at most one pixel; a single patch would make every vector perfectly local."""
    grid = reference_grid((side, side), 8)
    assert grid == 8
    change = torch.randn(2, side, side, 3, generator=torch.Generator().manual_seed(0))
    squares = squared_by_patch(change, grid)
    assert squares.shape == (2, 64)
    torch.testing.assert_close(squares.sum(1), change.double().square().sum((1, 2, 3)))
    sizes = squared_by_patch(torch.ones(1, side, side, 1), grid)
    assert set(sizes.sqrt().round(decimals=6).flatten().tolist()) >= {side // 8, side // 8 + 1}
    assert sizes.max().item() == pytest.approx(side**2 * even_share((side, side), grid))
    config = FieldConfig(spatial=1, channels=32, width=16, depth=3)
    field = Field(config, InnerConfig(), 3, seed=3, resolution=(side, side)).requires_grad_(False)
    z = 0.05 * torch.randn(3, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    shares = entry_effects(lambda z: field(z, (side, side)), z, torch.full((1, 1, 32), 0.05), range(8), grid)
    assert (shares.largest_share > 1 / 64).all() and shares.largest_share.mean() < 0.2


def test_squares_by_patch_are_those_of_the_patches() -> None:
    change = torch.randn(2, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    known = patchify(change.double().square(), S).sum((1, 2)).reshape(2, -1)
    torch.testing.assert_close(squared_by_patch(change, S), known)
