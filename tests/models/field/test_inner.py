"""The fast inner loop against the plain one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functa.models.compute.compilation import has_compiler
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.field import Field
from functa.models.field.grid import chunk_patches, patchify, pixel_coordinates, unpatchify
from functa.models.field.inner import InnerLoop, decode
from tests.helpers import plain_field as plain

FIELD_KEYS = ("spatial", "interpolation", "coordinates", "kernel", "axes", "mixer", "mixer_width")


def make(resolution: tuple[int, ...] = (8, 8), image_channels: int = 3, steps: int = 3, **variant: Any):
    """An inner loop in float64 and three random signals."""
    chosen = {key: variant.pop(key) for key in FIELD_KEYS if key in variant}
    field_config = FieldConfig(**{"spatial": 2, "channels": 6, "width": 16, "depth": 4, "w0": 8} | chosen)
    inner = InnerConfig(steps=steps, rates_init=(0.05, 0.2), **variant)
    field = Field(field_config, inner, image_channels, seed=3, resolution=resolution).double()
    with torch.no_grad():  # all biases start from zero, where a mistaken use of them would not show
        for bias in (*field.biases, field.modulation_bias, *(field.mixer.weights[2::2] if field.mixer else ())):
            bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(4))
        if inner.rates_per_step:
            field.rates.mul_(torch.linspace(1, 2, steps).reshape(-1, *[1] * (field.rates.dim() - 1)))
    images = torch.rand(3, *resolution, image_channels, generator=torch.Generator().manual_seed(1))
    return InnerLoop(field, inner, resolution), images.double()


VARIANTS: list[dict[str, Any]] = [
    {"spatial": 1},
    {"spatial": 4, "loss": "image"},
    {"rates": "scalar"},
    {"rates": "element", "resolution": (8, 12)},
    {"rates": "element", "rates_clip": (0.08, 0.15), "image_channels": 1},
    {"steps": 1},
    {"steps": 5, "chunk": 20},
    {"first_order": True},
    {"checkpoint": True, "rates": "element", "chunk": 40},
    {"checkpoint": True, "first_order": True},
    {"coordinates": "global", "resolution": (8, 12), "chunk": 48},
    {"coordinates": "binary", "spatial": 4},
    {"interpolation": "bilinear", "spatial": 4},
    {"interpolation": "bilinear", "coordinates": "patch", "resolution": (12, 20), "spatial": 4, "chunk": 30},
    {"interpolation": "bilinear", "coordinates": "global", "loss": "image", "rates": "scalar", "first_order": True},
    {"kernel": 3, "spatial": 4, "rates": "element"},
    {"kernel": 3, "interpolation": "bilinear", "spatial": 4, "steps": 2},
    {"kernel": 3, "coordinates": "binary", "spatial": 2, "chunk": 32},
    {"axes": 1, "resolution": (24,), "spatial": 4, "image_channels": 1},
    {"axes": 1, "resolution": (32,), "spatial": 4, "interpolation": "bilinear", "kernel": 3},
    {"axes": 3, "resolution": (4, 6, 8), "image_channels": 1, "rates": "element"},
    {"axes": 3, "resolution": (4, 4, 8), "interpolation": "bilinear", "kernel": 3, "steps": 2, "chunk": 32},
    {"mixer": 1, "mixer_width": 5, "spatial": 4, "rates_per_step": True},
    {"mixer": 2, "mixer_width": 5, "spatial": 4, "chunk": 20, "rates": "element", "rates_per_step": True},
    {"mixer": 1, "mixer_width": 4, "kernel": 3, "interpolation": "bilinear", "coordinates": "patch", "spatial": 4},
    {"mixer": 1, "mixer_width": 4, "coordinates": "global", "checkpoint": True, "first_order": True, "rates": "scalar"},
    {"mixer": 1, "mixer_width": 4, "axes": 1, "resolution": (24,), "spatial": 4, "image_channels": 1},
    {"mixer": 1, "mixer_width": 4, "axes": 3, "resolution": (4, 6, 8), "image_channels": 1, "chunk": 32},
    {"rates_per_step": True, "rates_clip": (0.08, 0.3), "checkpoint": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_latents_and_errors_equal_the_plain_loop(variant: dict[str, Any]) -> None:
    loop, images = make(**variant)
    expected = plain.encode(loop.field, images, loop.inner).detach()
    torch.testing.assert_close(loop.encode(images), expected)
    torch.testing.assert_close(loop.prepared(1000).encode(images), expected)
    decoded = plain.reconstruct(loop.field, expected, loop.resolution)
    torch.testing.assert_close(loop.field(expected, loop.resolution), decoded)
    errors = (decoded - images).square().flatten(1).mean(1).detach()
    torch.testing.assert_close(loop.errors(images), errors)
    torch.testing.assert_close(loop.errors_at(images, expected), errors)


@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 4, 5, 6, 8, 13, 15)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_latents_by_step_are_those_of_fewer_steps(
    variant: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shared:
        monkeypatch.setattr("functa.models.field.passes.first_step_bytes", lambda *_: 0)
    loop, images = make(**variant)
    path = loop.by_step(images)
    assert path.shape == (loop.inner.steps + 1, *loop.encode(images).shape)
    assert not path[0].any()
    for steps in range(1, loop.inner.steps + 1):
        expected = plain.encode(loop.field, images, loop.inner.model_copy(update={"steps": steps}))
        torch.testing.assert_close(path[steps], expected.detach())


def test_errors_at_latents_are_float32s_at_any_precision() -> None:
    loop, images = make(precision="bf16")
    loop.field.float()
    images = images.float()
    z = loop.encode(images)
    expected = (loop.field(z, loop.resolution) - images).square().flatten(1).mean(1).detach()
    torch.testing.assert_close(loop.errors_at(images, z), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(loop.errors(images), expected, rtol=1e-4, atol=0)  # bf16's own


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_outer_gradients_equal_the_plain_loop(variant: dict[str, Any]) -> None:
    loop, images = make(**variant)
    loss = plain.outer_loss(loop.field, images, loop.inner)
    expected = torch.autograd.grad(loss, list(loop.field.parameters()))
    torch.testing.assert_close(loop.outer_backward(images).mean(), loss.detach())
    for (name, parameter), gradient in zip(loop.field.named_parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler or Python.h here")
@pytest.mark.parametrize("variant", [VARIANTS[12], VARIANTS[22], VARIANTS[23]], ids=str)
def test_whole_images_in_one_compiled_graph_give_what_eager_steps_give(variant: dict[str, Any]) -> None:
    loop, images = make(**variant)
    loop.field.float()
    compiled = replace(loop, compiled=True)
    torch.testing.assert_close(compiled.encode(images.float()), loop.encode(images.float()), rtol=1e-4, atol=1e-5)
    loop.outer_backward(images.float())
    expected = [parameter.grad.clone() for parameter in loop.field.parameters()]
    loop.field.zero_grad()
    compiled.outer_backward(images.float())
    for parameter, gradient in zip(loop.field.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[10], VARIANTS[11], VARIANTS[14], VARIANTS[17]], ids=str)
def test_a_first_step_too_large_to_share_is_a_step_like_the_others(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    loop, images = make(**variant)
    z, errors = loop.encode(images), loop.outer_backward(images)
    gradients = [parameter.grad.clone() for parameter in loop.field.parameters()]
    loop.field.zero_grad()
    for limit in ("ALIKE_BYTES", "APART_BYTES"):
        monkeypatch.setattr(f"functa.models.field.cost.{limit}", 0)
    assert not loop.prepared(3).first.shared
    torch.testing.assert_close(loop.encode(images), z)
    torch.testing.assert_close(loop.outer_backward(images), errors)
    for parameter, gradient in zip(loop.field.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("call", ["encode", "errors", "outer_backward"])
def test_images_of_another_shape_or_type_are_refused(call: str) -> None:
    loop, images = make()
    others = (images[:, :4], images[..., :1], images.reshape(3, 4, 16, 3), (images * 255).to(torch.uint8), images[:0])
    for other in others:
        with pytest.raises(ValueError, match=r"are not floats \[B, 8, 8, 3\] in \[0, 1\]: resize or convert"):
            getattr(loop, call)(other)
    with pytest.raises(ValueError, match="exists at the resolution it was fitted on alone"):
        InnerLoop(make(coordinates="binary")[0].field, loop.inner, (16, 16))
    with pytest.raises(ValueError, match="is not divisible"):
        InnerLoop(loop.field, loop.inner, (9, 9))


def test_a_loop_prepared_for_encoding_does_not_train() -> None:
    loop, images = make()
    with pytest.raises(ValueError, match="a loop prepared for encoding has no gradient of its first step"):
        loop.prepared(3).outer_backward(images)


@pytest.mark.parametrize("variant", [{"spatial": 1}, {"interpolation": "bilinear", "coordinates": "global"}], ids=str)
def test_pixels_of_a_large_patch_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]) -> None:
    loop, images = make(**variant)
    z = loop.encode(images)
    whole = loop.field(z, (16, 16))
    monkeypatch.setattr("functa.models.field.field.DECODE_PIXELS", 7)
    torch.testing.assert_close(loop.field(z, (16, 16)), whole)


@pytest.mark.parametrize(
    "variant",
    [{"interpolation": "bilinear"}, {"interpolation": "bilinear", "kernel": 3}, {"kernel": 3}, {"rates": "element"}],
    ids=str,
)
def test_outer_gradients_are_the_slopes_of_the_loss(variant: dict[str, Any]) -> None:
    """Central differences along a random direction in float64, independent of any autograd."""
    loop, images = make(**variant)
    parameters = list(loop.field.parameters())
    loop.outer_backward(images)
    generator = torch.Generator().manual_seed(7)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs().mean() for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction))
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        losses.append(float(loop.errors(images).mean()))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_gradients_add_up_over_micro_batches() -> None:
    """Parts of a batch, each with its share, give the gradient of the whole."""
    loop, images = make(rates="element")
    loop.outer_backward(images)
    whole = [p.grad.clone() for p in loop.field.parameters()]
    loop.field.zero_grad()
    for part in images.split(2):
        loop.outer_backward(part, share=len(part) / len(images))
    for parameter, expected in zip(loop.field.parameters(), whole):
        torch.testing.assert_close(parameter.grad, expected)


def test_random_patches_give_the_gradient_of_all_on_average() -> None:
    """Every position taken once, in parts: their mean is the whole gradient, so a random part is unbiased."""
    loop, images = make(spatial=4, rates="element")
    loop.outer_backward(images)
    whole = [p.grad.clone() for p in loop.field.parameters()]
    loop.field.zero_grad()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(len(images))])
    for part in order.split(4, dim=1):
        loop.outer_backward(images, positions=part, share=0.25)
    for parameter, expected in zip(loop.field.parameters(), whole):
        torch.testing.assert_close(parameter.grad, expected)


def test_patches_that_depend_on_each_other_cannot_be_picked() -> None:
    loop, images = make(interpolation="bilinear")
    with pytest.raises(ValueError, match=r"leave out meta_train\.patches_per_image"):
        loop.outer_backward(images, positions=torch.zeros(3, 1, dtype=torch.int64))


def test_binary_coordinates_are_those_of_the_papers_example() -> None:
    """App. C: on 32x32, (3/32, 5/32) becomes 0001100101."""
    config = FieldConfig(spatial=1, interpolation="bilinear")
    x = pixel_coordinates(config, (32, 32), torch.zeros(()))
    assert x[0, 3 * 32 + 5].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 0, 1]


def test_binary_coordinates_want_a_power_of_two_and_the_fitted_resolution() -> None:
    config = FieldConfig(interpolation="bilinear", spatial=4)
    with pytest.raises(ValueError, match="sides that are powers of two, not 12"):
        Field(config, InnerConfig(), 3, resolution=(12, 12))
    field = Field(config, InnerConfig(), 3, resolution=(16, 16))
    with pytest.raises(ValueError, match="fitted on alone, 16x16, not 32x32: decode it there"):
        field(torch.zeros(1, 4, 4, 16), (32, 32))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_finer_picture_passes_through_the_fitted_pixels(interpolation: str) -> None:
    """At three times the resolution the middle of every 3x3 block is a pixel centre of the coarse grid."""
    for coordinates in ("patch", "global"):
        loop, images = make(interpolation=interpolation, coordinates=coordinates, spatial=4)
        z = loop.encode(images)
        torch.testing.assert_close(loop.field(z, (24, 24))[:, 1::3, 1::3], loop.field(z, (8, 8)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_named(bad: float) -> None:
    loop, images = make()
    images[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match=r"images \[1\] of the batch have NaN or infinite pixels"):
        loop.encode(images)


def test_a_latent_does_not_depend_on_its_batch() -> None:
    loop, images = make()
    torch.testing.assert_close(loop.encode(images)[1:2], loop.encode(images[1:2]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_matmuls_stay_close_to_float32(precision: str) -> None:
    images = torch.rand(4, 8, 8, 3)
    latents = []
    for chosen in ("float32", precision):
        inner = InnerConfig(precision=chosen)
        field = Field(FieldConfig(spatial=2, channels=8, width=64, depth=5), inner, 3)
        latents.append(InnerLoop(field, inner, (8, 8)).encode(images))
    assert 0 < (latents[0] - latents[1]).norm() / latents[0].norm() < 0.02


def test_a_patch_sees_only_its_own_latent() -> None:
    loop, _ = make(spatial=4)
    z = torch.randn(1, 4, 4, 6, dtype=torch.float64)
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


@given(
    patches=st.integers(1, 5000), pixels=st.integers(1, 10000), patch=st.integers(1, 64), parts=st.integers(1, 16)
)  # fmt: skip
def test_chunks_are_equal_and_within_the_limit(patches: int, pixels: int, patch: int, parts: int) -> None:
    size = chunk_patches(patches, pixels, patch, parts)
    assert patches // size >= min(parts, patches)
    assert patches % size == 0
    assert size * patch <= max(pixels, patch)


def test_an_indivisible_image_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="not divisible into 3x3 latent positions"):
        patchify(torch.zeros(1, 8, 8, 1), 3)


def test_tf32_is_switched_on_for_the_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the switch changes nothing, but it must be on while the field's products are taken, and off after."""
    seen: list[bool] = []
    modulate = Field.modulate

    def watched(field: Field, z: Tensor) -> list[Tensor]:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return modulate(field, z)

    monkeypatch.setattr(Field, "modulate", watched)
    for precision in ("tf32", "float32"):
        loop, images = make(precision=precision)
        seen.clear()
        loop.prepared(3).encode(images)
        loop.errors(images)
        loop.outer_backward(images)
        assert seen
        assert set(seen) == {precision == "tf32"}
        assert not torch.backends.cuda.matmul.allow_tf32
