"""Costs in closed form: against the paper's predecessor, against torch's own counter and parameters, and by hand."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.cost import (
    encode_passes,
    forward_flops,
    outer_flops,
    outer_memory,
    outer_passes,
    parameter_count,
)
from functa.models.field.field import Field

NEAREST = FieldConfig(spatial=8, channels=16, width=256, depth=6)
BILINEAR = FieldConfig(spatial=8, channels=16, width=256, depth=6, interpolation="bilinear")
WIDE = FieldConfig(spatial=8, channels=16, width=256, depth=6, kernel=3)
MIXED = FieldConfig(spatial=8, channels=16, width=256, depth=6, mixer=2, mixer_width=24)
ELEMENT = InnerConfig(rates="element")
SIDES = (32, 32)
GLOBAL = {"coordinates": "global"}


@pytest.mark.parametrize(
    ("field", "reference"),
    [
        (FieldConfig(spatial=1, channels=1024, width=256, depth=6), 1_578_755),
        (NEAREST, 288_515),
    ],
)
def test_parameters_are_those_of_the_reference_code_but_for_the_latent_that_it_counts(field, reference) -> None:
    assert parameter_count(field, ELEMENT, 3, SIDES) == reference - field.numbers


@pytest.mark.parametrize("rates", ["scalar", "channel", "element"])
def test_parameters_are_those_of_the_built_field(rates) -> None:
    inner = InnerConfig(rates=rates, rates_per_step=rates == "channel")
    for config in (NEAREST, BILINEAR, WIDE, MIXED, FieldConfig(spatial=1, channels=24, width=32, depth=2)):
        built = sum(parameter.numel() for parameter in Field(config, inner, 3, resolution=SIDES).parameters())
        assert parameter_count(config, inner, 3, SIDES) == built


def test_a_variant_adds_what_it_is_made_of() -> None:
    plain, modulations = parameter_count(NEAREST, ELEMENT, 3, SIDES), 5 * 256
    assert parameter_count(BILINEAR, ELEMENT, 3, SIDES) == plain + 8 * 256  # 10 bits of an index instead of 2 numbers
    assert parameter_count(WIDE, ELEMENT, 3, SIDES) == plain + 8 * 16 * modulations  # 9 taps instead of 1
    for axes, taps in ((1, 3), (3, 27)):
        one, many = (FieldConfig(spatial=2, channels=4, width=8, depth=3, axes=axes, kernel=k) for k in (1, 3))
        added = parameter_count(many, ELEMENT, 1, (8,) * axes) - parameter_count(one, ELEMENT, 1, (8,) * axes)
        assert added == (taps - 1) * 4 * 16


@pytest.mark.parametrize("config", [NEAREST, FieldConfig(spatial=1, channels=24, width=32, depth=4)])
def test_forward_flops_are_those_that_torch_counts(config) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Field(config, ELEMENT, 3)(torch.zeros(1, *config.latent_shape), SIDES)
    first = 2 * 2 * config.width  # of one pixel; patches with the same coordinates share it, images do not count on it
    shared = 1024 - 1024 // config.positions
    assert forward_flops(config, SIDES, 3) == counter.get_total_flops() + shared * first


@pytest.mark.parametrize(
    "config",
    [BILINEAR, BILINEAR.model_copy(update={"kernel": 3}), *(c.model_copy(update=GLOBAL) for c in (WIDE, MIXED))],
)
def test_forward_flops_of_the_variants_are_those_that_torch_counts(config) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Field(config, ELEMENT, 3, resolution=SIDES)(torch.zeros(1, *config.latent_shape), SIDES)
    assert forward_flops(config, SIDES, 3) == counter.get_total_flops()


def test_forward_flops_of_the_variants() -> None:
    plain, modulations = forward_flops(NEAREST, SIDES, 3), 5 * 256
    assert forward_flops(WIDE, SIDES, 3) - plain == 2 * 64 * 8 * 16 * modulations
    bits, mixing, mapping = 1024 * 8 * 256, 1024 * 9 * modulations, 64 * 8 * 16 * modulations
    assert forward_flops(BILINEAR, SIDES, 3) - plain == 2 * (bits + mixing + mapping)
    line, volume = (FieldConfig(spatial=2, channels=4, width=8, depth=3, axes=axes) for axes in (1, 3))
    assert forward_flops(line, (8,), 1) == 2 * (8 * (8 + 64 + 8) + 2 * 4 * 16)
    assert forward_flops(volume, (4, 4, 4), 1) == 2 * (64 * (3 * 8 + 64 + 8) + 8 * 4 * 16)


def test_passes_of_three_inner_steps_and_of_others() -> None:
    assert (encode_passes(InnerConfig(), psnr=False), encode_passes(InnerConfig())) == (4, 5)
    small, large = 32 * 32, 64 * 64  # a chunk holds an image, or not
    assert outer_passes(NEAREST, InnerConfig(), large) == 15
    assert outer_passes(NEAREST, InnerConfig(checkpoint=True), small) == 19
    assert outer_passes(BILINEAR, InnerConfig(), small) == outer_passes(MIXED, InnerConfig(), small) == 15
    assert outer_passes(BILINEAR, InnerConfig(), large) == outer_passes(WIDE, InnerConfig(), large) == 19
    assert outer_passes(BILINEAR, InnerConfig(first_order=True), large) == 7
    assert (outer_passes(NEAREST, InnerConfig(steps=1), small), encode_passes(InnerConfig(steps=1))) == (3, 1)
    assert outer_passes(NEAREST, InnerConfig(steps=5), small) == 27


def test_a_step_on_some_patches_costs_their_share() -> None:
    whole = outer_flops(NEAREST, ELEMENT, SIDES, 3)
    assert whole == 15 * forward_flops(NEAREST, SIDES, 3)
    assert outer_flops(NEAREST, ELEMENT, SIDES, 3, patches_per_image=16) == whole / 4


def test_memory_grows_with_pixels_only_through_the_images_themselves() -> None:
    field = FieldConfig(spatial=32, channels=64, width=256, depth=8)
    small, large = (outer_memory(field, InnerConfig(rates="channel"), (d, d), 3, 4) for d in (128, 256))
    images, first_step = 4 * 4 * 3 * (256**2 - 128**2), 3 * 4 * 3 * (8**2 - 4**2) * field.modulations
    assert large - small == images + first_step
    checkpointed = outer_memory(field, InnerConfig(rates="channel", checkpoint=True), (256, 256), 3, 4)
    assert large - checkpointed == 4 * 3 * InnerConfig().chunk * 256 * 7
    two_cores = outer_memory(field, InnerConfig(rates="channel"), (256, 256), 3, 4, cores=2)
    assert two_cores - large == 4 * 9 * InnerConfig().chunk * 256 * 7
    averaged = outer_memory(field, InnerConfig(rates="channel"), (256, 256), 3, 4, average=True)
    assert averaged - large == 4 * parameter_count(field, InnerConfig(rates="channel"), 3, (256, 256))
    by_patch = FieldConfig(spatial=1, channels=64, width=256, depth=8)  # a patch larger than a chunk
    assert outer_memory(by_patch, InnerConfig(), (256, 256), 3, 1) > 4 * 9 * 256**2 * 256 * 7


MEASURED = """
import resource, sys, torch
from functa.models.config import FieldConfig, InnerConfig
from functa.models.field.cost import outer_memory
from functa.models.field.field import Field
from functa.models.field.inner import InnerLoop

def step(side, coordinates, interpolation):
    chosen = {"coordinates": coordinates, "interpolation": interpolation}
    config = FieldConfig(spatial=8, channels=16, width=64, depth=6, **chosen)
    inner = InnerConfig(rates="channel", compile="off")
    field = Field(config, inner, 3, resolution=(side, side))
    InnerLoop(field, inner, (side, side)).outer_backward(torch.rand(2, side, side, 3))
    return outer_memory(config, inner, (side, side), 3, 2)

torch.set_num_threads(1)
variant = sys.argv[2:]
step(16, *variant)  # libraries, and what they build at the first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
estimate = step(int(sys.argv[1]), *variant)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024, estimate)
"""


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(("patch", "nearest"), id="patch-nearest", marks=pytest.mark.slow),
        pytest.param(("global", "nearest"), id="global-nearest", marks=pytest.mark.slow),
        pytest.param(("binary", "bilinear"), id="binary-bilinear", marks=pytest.mark.slow),
    ],
)
def test_measured_memory_stays_within_the_estimate_and_hardly_grows_with_the_image(variant: tuple[str, str]) -> None:
    used = {}
    for side in (64, 256):
        command = [sys.executable, "-c", MEASURED, str(side), *variant]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250).stdout.split()
        used[side], estimate = int(printed[0]), int(printed[1])
        assert used[side] < 1.5 * estimate + 64e6
    # Sixteen times the pixels: what a chunk needs is the same, and a first step too large to share is not shared.
    assert used[256] - used[64] < 1.5 * 6 * (1 << 26)
