"""The fast inner loop against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import FieldConfig, InnerConfig
from models.field import Field, parameter_count
from models.grid import patchify, unpatchify
from models.inner import InnerLoop, decode
from models.patches import chunk_patches
from tests.models import plain


def make(spatial: int = 2, steps: int = 3, resolution: tuple[int, int] = (8, 8), channels: int = 3, **inner: object):
    field_config = FieldConfig(spatial=spatial, channels=6, width=16, depth=4, w0=8)
    inner_config = InnerConfig(steps=steps, rates_init=(0.05, 0.2), **inner)
    field = Field(field_config, inner_config, channels, seed=3).double()
    images = torch.rand(3, *resolution, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.set_default_dtype(torch.float64)
    return InnerLoop(field, inner_config, resolution), images


@pytest.fixture(autouse=True)
def _restore_dtype():
    yield
    torch.set_default_dtype(torch.float32)


VARIANTS = [
    {"spatial": 1},
    {"spatial": 4, "loss": "image"},
    {"rates": "scalar"},
    {"rates": "element", "resolution": (8, 12)},
    {"rates": "element", "rates_clip": (0.08, 0.15), "channels": 1},
    {"steps": 1},
    {"steps": 5, "chunk": 20},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_latents_equal_the_plain_loop(variant: dict) -> None:
    loop, images = make(**variant)
    torch.testing.assert_close(loop.encode(images), plain.encode(loop.field, images, loop.inner).detach())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_outer_gradients_equal_the_plain_loop(variant: dict) -> None:
    loop, images = make(**variant)
    loss = plain.outer_loss(loop.field, images, loop.inner)
    expected = torch.autograd.grad(loss, list(loop.field.parameters()))
    torch.testing.assert_close(loop.outer_backward(images).mean(), loss.detach())
    for (name, parameter), gradient in zip(loop.field.named_parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_a_latent_does_not_depend_on_its_batch() -> None:
    loop, images = make()
    torch.testing.assert_close(loop.encode(images)[1:2], loop.encode(images[1:2]))


def test_errors_are_those_of_the_decoded_latents() -> None:
    loop, images = make()
    decoded = loop.field(loop.encode(images), (8, 8))
    torch.testing.assert_close(loop.errors(images), (decoded - images).square().mean((1, 2, 3)).detach())


def test_bf16_matmuls_stay_close_to_float32() -> None:
    torch.set_default_dtype(torch.float32)
    images = torch.rand(4, 8, 8, 3)
    latents = []
    for precision in ("float32", "bf16"):
        inner = InnerConfig(precision=precision)
        field = Field(FieldConfig(spatial=2, channels=8, width=64, depth=5), inner, 3)
        latents.append(InnerLoop(field, inner, (8, 8)).encode(images))
    assert 0 < (latents[0] - latents[1]).norm() / latents[0].norm() < 0.02


def test_a_patch_sees_only_its_own_latent() -> None:
    loop, _ = make(spatial=4)
    z = torch.randn(1, 4, 4, 6)
    moved = z.clone()
    moved[0, 1, 2] += 1
    change = (loop.field(moved, (8, 8)) - loop.field(z, (8, 8))).abs().sum(-1)[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:4, 4:6] = True
    assert (change[inside] > 0).all()
    assert (change[~inside] == 0).all()


def test_decoding_at_twice_the_resolution_averages_to_the_image() -> None:
    """The field is smooth: between the pixels it was fitted on it stays near their values."""
    loop, images = make()
    z = loop.encode(images)
    fine, coarse = decode(loop.field, z, (32, 32)), decode(loop.field, z, (8, 8))
    pooled = torch.nn.functional.avg_pool2d(fine.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert (pooled - coarse).abs().mean() < 0.05


@given(
    batch=st.integers(1, 3), spatial=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4),
    channels=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_unpatchify_inverts_patchify(batch: int, spatial: int, rows: int, columns: int, channels: int) -> None:
    images = torch.rand(batch, spatial * rows, spatial * columns, channels)
    patches = patchify(images, spatial)
    assert patches.shape == (batch * spatial**2, rows * columns, channels)
    assert torch.equal(unpatchify(patches, spatial, (spatial * rows, spatial * columns)), images)


@given(patches=st.integers(1, 5000), pixels=st.integers(1, 10000), patch=st.integers(1, 64))
def test_chunks_are_equal_and_within_the_limit(patches: int, pixels: int, patch: int) -> None:
    size = chunk_patches(patches, pixels, patch)
    assert patches % size == 0
    assert size * patch <= max(pixels, patch)


def test_an_indivisible_image_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="not divisible into 3x3 latent positions"):
        patchify(torch.zeros(1, 8, 8, 1), 3)


def test_parameter_count_is_that_of_the_module() -> None:
    for rates in ("scalar", "channel", "element"):
        config, inner = FieldConfig(spatial=4, channels=8, width=32, depth=3), InnerConfig(rates=rates)
        assert parameter_count(config, inner, 3) == sum(p.numel() for p in Field(config, inner, 3).parameters())


def test_parameter_counts_of_the_reference() -> None:
    """1 578 755 parameters for the vector field and 288 515 for the spatial one, their latent counted too."""
    vector = FieldConfig(spatial=1, channels=1024, width=256, depth=6)
    assert parameter_count(vector, InnerConfig(rates="channel"), 3) == 1_578_755 - 1024
    spatial = FieldConfig(spatial=8, channels=16, width=256, depth=6)
    assert parameter_count(spatial, InnerConfig(rates="element"), 3) == 288_515 - 1024
