"""The method as the paper writes it, with autograd inside autograd: slow, short, and independent of models/inner.py."""

import torch
from torch import Tensor

from models.config import InnerConfig
from models.field import Field


def inner_loss(field: Field, z: Tensor, images: Tensor, inner: InnerConfig) -> Tensor:
    """Sum over images of the mean squared error, so that an image's gradient does not depend on the batch."""
    error = (field(z, tuple(images.shape[1:3])) - images).square().mean((1, 2, 3)).sum()
    return error * (field.config.spatial**2 if inner.loss == "patch" else 1)


def encode(field: Field, images: Tensor, inner: InnerConfig) -> Tensor:
    z = torch.zeros(len(images), *field.config.latent_shape, dtype=images.dtype, requires_grad=True)
    rates = field.rates if inner.rates_clip is None else field.rates.clamp(*inner.rates_clip)
    for _ in range(inner.steps):
        (gradient,) = torch.autograd.grad(inner_loss(field, z, images, inner), z, create_graph=True)
        z = z - rates * gradient
    return z


def outer_loss(field: Field, images: Tensor, inner: InnerConfig) -> Tensor:
    return (field(encode(field, images, inner), tuple(images.shape[1:3])) - images).square().mean()
