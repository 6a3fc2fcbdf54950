"""The cost of a field: floating-point operations, parameters and memory, from its config alone. Free of torch.

The unit of work is one forward pass of all pixels of one image through the field; an inner step (forward, then back to
the latent, no weight gradients) is two, and a backward pass through a recorded graph is twice what it records. The
shared first inner step, the linear algebra of the optimiser and sines are left out: a few percent at most.
"""

import math
from collections.abc import Sequence

from functa.models.config import FieldConfig, InnerConfig

FLOAT_BYTES = 4

# Tensors of the shape of one layer's activations that an inner step under checkpointing holds: its sine, cosine and
# argument, forward and for the gradient through it.
CHECKPOINTED_TENSORS = 6

# A larger Jacobian of the first step is not shared: of patches with the same coordinates, and with their own.
ALIKE_BYTES, APART_BYTES = 1 << 29, 1 << 26

FIRST_STEP_COPIES = {"patch": 3, "global": 6, "binary": 6}  # of it at once: made, mapped, and their cotangents


def coordinate_bits(side: int) -> int:
    """Bits of a pixel's index along a side. Raises ValueError unless the side is a power of two."""
    if side < 1 or side & (side - 1):
        raise ValueError(
            f"field.coordinates=binary needs sides that are powers of two, not {side}: "
            f"choose another images.resolution, or field.coordinates=patch or global"
        )
    return side.bit_length() - 1


def coordinate_inputs(field: FieldConfig, resolution: Sequence[int]) -> int:
    """Numbers that the first layer takes per pixel: one per axis, or the bits of the pixel's index (App. C)."""
    if field.coordinates == "binary":
        return sum(coordinate_bits(side) for side in resolution)
    return field.axes


def forward_flops(field: FieldConfig, resolution: Sequence[int], image_channels: int) -> int:
    """Return the FLOPs of one signal of `resolution` through map and field; a multiply-add counts two."""
    width, pixels = field.width, math.prod(resolution)
    inputs = coordinate_inputs(field, resolution)
    layers = inputs * width + (field.depth - 2) * width**2 + image_channels * width
    # Bilinear: the pixels of a patch see the modulations of all positions around it, their own included, and mix
    # them in one matmul whose weights are mostly zero.
    seen = 3**field.axes if field.interpolation == "bilinear" else 1
    mixing = seen * field.modulations if seen > 1 else 0
    mapping = seen * field.kernel**field.axes * field.map_channels * field.modulations
    return 2 * (pixels * (layers + mixing) + field.positions * (mapping + mixer_weights(field)))


def mixer_weights(field: FieldConfig) -> int:
    """Return the weights of the convolutions over the latent grid, each of which is used once at every position."""
    if not field.mixer:
        return 0
    return 3**field.axes * field.mixer_width * (field.channels + 2 * field.mixer * field.mixer_width)


def encode_passes(inner: InnerConfig, psnr: bool = True) -> int:
    """Forward-pass equivalents of encoding one image: all inner steps but the shared first, and one for the PSNR."""
    return 2 * (inner.steps - 1) + int(psnr)


def outer_passes(field: FieldConfig, inner: InnerConfig, pixels: int) -> int:
    """Forward-pass equivalents of one image of so many pixels in an outer step of K inner steps, the first shared.

    Recorded: K - 1 inner steps and the last forward pass, 2 (K - 1) + 1, and twice that backward: 15 for K = 3. With
    activation checkpointing nothing is recorded at first, and each step runs again as its turn comes: 19. First order
    differentiates the last forward pass alone: 7.
    """
    inner_steps = 2 * (inner.steps - 1)
    if inner.first_order:
        return inner_steps + 3
    if checkpoints(field, inner, pixels):
        return inner_steps + 3 + 3 * inner_steps
    return 3 * (inner_steps + 1)


def checkpoints(field: FieldConfig, inner: InnerConfig, pixels: int) -> bool:
    """Return whether the outer step recomputes activations: where patches depend on their neighbours and an image of
    so many pixels is more than a chunk, it must."""
    return inner.checkpoint or (not field.independent and pixels > inner.chunk)


def outer_flops(
    field: FieldConfig,
    inner: InnerConfig,
    resolution: Sequence[int],
    image_channels: int,
    patches_per_image: int | None = None,
) -> float:
    """Return the FLOPs of one image in one outer step; a step on some of its patches costs their share."""
    share = 1.0 if patches_per_image is None else patches_per_image / field.positions
    return share * outer_passes(field, inner, math.prod(resolution)) * forward_flops(field, resolution, image_channels)


def parameter_count(field: FieldConfig, inner: InnerConfig, image_channels: int, resolution: Sequence[int]) -> int:
    """Weights, modulation map [k^2 c, C] with its bias, and rates, without building them."""
    width, depth, channels = field.width, field.depth, field.channels
    siren = (coordinate_inputs(field, resolution) + 1) * width + (depth - 2) * (width + 1) * width
    siren += (width + 1) * image_channels
    mapping = (field.kernel**field.axes * field.map_channels + 1) * field.modulations
    rates = {"scalar": 1, "channel": channels, "element": field.numbers}[inner.rates]
    return siren + mapping + mixer_weights(field) + rates * (inner.steps if inner.rates_per_step else 1)


def first_step_bytes(field: FieldConfig, pixels: int, image_channels: int) -> int:
    """Return the bytes of the Jacobian that the first step shares over so many pixels; 0: too large to share.

    `pixels` are those of one patch where all patches have the same coordinates, else all of the image. There every
    chunk differentiates a part of its own, which costs several times its size.
    """
    size = FLOAT_BYTES * pixels * image_channels * field.modulations
    return size if size <= (ALIKE_BYTES if field.coordinates == "patch" else APART_BYTES) else 0


def outer_memory(
    field: FieldConfig,
    inner: InnerConfig,
    resolution: Sequence[int],
    image_channels: int,
    micro_batch: int,
    cores: int = 1,
    average: bool = False,
) -> int:
    """Bytes of an outer step beside the libraries, an estimate: a chunk's graph a core, weights, a micro-batch.

    `average`: averaged weights are kept too. The images that training keeps in memory are not counted.
    """
    pixels = math.prod(resolution)
    chunk = max(inner.chunk, pixels // field.positions)  # a chunk is whole patches, at least one
    chunk = min(cores * chunk, micro_batch * pixels)
    recorded = 3 * (inner.steps - 1) + 3  # 9 for three steps: sine, cosine and argument of every recorded pass
    tensors = CHECKPOINTED_TENSORS if checkpoints(field, inner, pixels) or inner.first_order else recorded
    activations = chunk * field.width * (field.depth - 1) * tensors
    copies = 4 + average  # themselves, gradient, two moments, average
    weights = copies * parameter_count(field, inner, image_channels, resolution)
    batch = micro_batch * (pixels * image_channels + inner.steps * field.numbers)
    different = pixels // field.positions if field.coordinates == "patch" else pixels
    first = FIRST_STEP_COPIES[field.coordinates] * first_step_bytes(field, different, image_channels)
    return FLOAT_BYTES * (activations + weights + batch) + first
