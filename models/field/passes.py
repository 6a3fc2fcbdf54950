"""Forward and backward passes of the field over patches, as pure functions that one compiled graph can hold.

The gradient of the inner loss is written out (forward, then the chain rule back to the modulations), so that an inner
step needs no autograd and the outer gradient no autograd inside autograd. Shapes: N patches of P pixels and ch image
channels, W = width, C = W (depth - 1). A patch's modulations come from K latent positions with T taps of the map each
(grid.neighbours); for nearest interpolation and a 1x1 map K = T = 1, and a modulation is never spread over pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from functa.models.field.cost import first_step_bytes
from functa.models.field.field import Field
from functa.models.field.sine import sine_cosine


@dataclass(frozen=True)
class FirstStep:
    """The first inner step, which all latents share because they start from zero.

    output: f at zero [Q, P, ch]; jacobian: of f by the latent [Q, P, ch, T c] if `mapped`, else by the modulations
    [Q, P, ch, C]. Q is 1 where all patches have the same coordinates, else the latent positions of an image. Where
    that would be too large to share, `shared` is false, both are empty, and the first step is one like the others.
    """

    output: Tensor
    jacobian: Tensor
    mapped: bool
    shared: bool = True

    def at(self, positions: Tensor) -> "FirstStep":
        """Return the part for patches at these positions [N]."""
        if len(self.output) == 1 or not self.shared:
            return self
        return FirstStep(self.output[positions], self.jacobian[positions], self.mapped)


@contextmanager
def tensor_cores(precision: str) -> Iterator[None]:
    """Within, a GPU takes products in tf32 if that is the precision, and sums halves up in float32 always.

    torch's switches are put back.
    """
    switches = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(switches, name) for name in names}
    for name in names:
        setattr(switches, name, name == "allow_tf32" and precision == "tf32")
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(switches, name, value)


def matmul(h: Tensor, weight: Tensor, precision: str) -> Tensor:
    """h [..., m] @ weight [m, n] with operands in `precision`, summed in float32 and rounded to `precision` once.

    What comes back is float32 (float64 stays), and so is all that follows. A compiled graph may leave the rounding out.
    """
    if precision == "bf16":
        return (h.bfloat16() @ weight.bfloat16()).float()
    if precision == "fp16":
        return (h.half() @ weight.half()).float()
    return h @ weight  # tf32 is a switch of torch's, not a type: tensor_cores


def forward(field: Field, z: Tensor, x: Tensor, weights: Tensor | None, precision: str) -> tuple[Tensor, list[Tensor]]:
    """z [N, K, T c], x [1 or N, P, in], weights [P, K] -> output [N, P, ch], every sine layer's cosine [N, P, W]."""
    cosines: list[Tensor] = []
    h = x
    for i, shift in enumerate(field.modulate(z)):  # [N, K, W] each
        at_pixels = shift if weights is None else weights @ shift  # [N, 1 or P, W]
        # The first layer's matmul is shared by all patches where they share coordinates: [1, P, W].
        h = h @ field.weights[0] if i == 0 else matmul(h, field.weights[i], precision)
        h, cosine = sine_cosine(field.config.w0 * (h + (field.biases[i] + at_pixels)))  # [N, P, W]
        cosines.append(cosine)
    return h @ field.weights[-1] + field.biases[-1] + 0.5, cosines


def pull_back(field: Field, cotangent: Tensor, cosines: list[Tensor], precision: str) -> Iterator[Tensor]:
    """Cotangent of the output [N, P, ch] -> of every layer's shift at every pixel [N, P, W], last layer first."""
    g = cotangent @ field.weights[-1].T
    for i in reversed(range(len(cosines))):
        g = field.config.w0 * g * cosines[i]  # [N, P, W]
        yield g
        if i:
            g = matmul(g, field.weights[i].T, precision)


def inner_gradient(
    field: Field, z: Tensor, targets: Tensor, x: Tensor, weights: Tensor | None, scale: float, precision: str
) -> Tensor:
    """Gradient of scale * sum((f - t)^2) by z [N, K, T c], for targets [N, P, ch].

    The scale comes last: a mean over 196,608 values would push half-precision cotangents below their range.
    """
    output, cosines = forward(field, z, x, weights, precision)
    pulled = [
        g.sum(1, keepdim=True) if weights is None else weights.T @ g  # [N, K, W]
        for g in pull_back(field, output - targets, cosines, precision)
    ]
    return 2 * scale * (torch.cat(pulled[::-1], dim=-1) @ field.modulation_weight.T)


def patch_errors(field: Field, z: Tensor, targets: Tensor, x: Tensor, weights: Tensor | None, precision: str) -> Tensor:
    """Mean squared error of every patch, [N]. The outer loss is its mean over all patches."""
    output, _ = forward(field, z, x, weights, precision)
    return (output - targets).square().mean((1, 2))


def first_step(field: Field, x: Tensor, precision: str, patches: int) -> FirstStep:
    """f and its Jacobian at z = 0 for coordinates x [Q, P, in]: one forward pass and one backward pass per channel.

    The map is applied to the Jacobian where the step is to be taken for so many patches that this pays. Nothing is
    shared where it would take too much memory (cost.first_step_bytes).
    """
    if first_step_bytes(field.config, x.shape[:2].numel(), field.image_channels) == 0:
        nothing = x.new_zeros(len(x), 0)
        return FirstStep(nothing, nothing, mapped=False, shared=False)
    zero = x.new_zeros(len(x), 1, field.modulation_weight.shape[0])
    output, cosines = forward(field, zero, x, None, precision)  # [Q, P, ch]
    channels = output.shape[-1]
    by_channel = []
    for channel in range(channels):
        one_hot = torch.zeros_like(output)
        one_hot[..., channel] = 1
        pulled = list(pull_back(field, one_hot, cosines, precision))
        by_channel.append(torch.cat(pulled[::-1], dim=-1))  # [Q, P, C]
    jacobian = torch.stack(by_channel, dim=2)  # [Q, P, ch, C]
    inputs, outputs = x.shape[1] * channels, field.modulation_weight.shape[0]
    mapped = patches * (inputs + outputs) > len(x) * inputs * outputs
    return FirstStep(output, jacobian @ field.modulation_weight.T if mapped else jacobian, mapped)


def first_gradient(field: Field, first: FirstStep, targets: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """Gradient of scale * sum((f - t)^2) by z at zero [N, K, T c], for targets [N, P, ch]."""
    residual = first.output - targets
    if weights is None:
        pixels = first.jacobian.flatten(1, 2)  # [1 or N, P ch, T c or C]
        flat = residual.flatten(1)
        gradient = (flat @ pixels[0] if len(pixels) == 1 else (flat[:, None] @ pixels)[:, 0])[:, None]
    else:
        jacobian = first.jacobian.expand(len(residual), *first.jacobian.shape[1:])
        gradient = weights.T @ torch.einsum("npo,npot->npt", residual, jacobian)
    return 2 * scale * (gradient if first.mapped else gradient @ field.modulation_weight.T)
