"""Classifiers: a Transformer on latent tokens (App. C.1, C.3), an MLP on vectors (B.1), a small network on pixels."""

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from functa.models.config import ClassifierConfig
from functa.models.latents.cost import token_count
from functa.models.latents.dropout import Dropout


class TokenClassifier(nn.Module):
    """Takes channels-last latents to a network that wants an image of tokens, [B, c, n, 1]."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels

    def forward(self, z: Tensor) -> Tensor:
        """Normalised latents [B, s, s, c] -> logits [B, K]."""
        tokens = z.reshape(len(z), -1, 1, self.channels)  # [B, n, 1, token's numbers]
        return cast(Tensor, self.network(tokens.permute(0, 3, 1, 2)))


class VectorClassifier(nn.Sequential):
    """Hidden layers with SiLU and dropout, then a linear one (App. B.1); it flattens whatever latent it is given."""

    def __init__(self, numbers: int, width: int, depth: int, dropout: float, classes: int) -> None:
        hidden: list[nn.Module] = []
        for inputs in (numbers, *[width] * (depth - 1)):
            hidden += [nn.Linear(inputs, width), nn.SiLU(), Dropout(dropout)]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(width, classes))


def build_classifier(config: ClassifierConfig, latent_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A classifier of normalised latents. forward: [B, s, s, c] -> logits [B, K].

    transformer: one token per latent position, or several where a vector is cut into tokens; learned positions, mean
    pooling, GELU. timm's `drop_rate` is the paper's "dropout only once before the final linear"; every other dropout
    of the network is zero. C.3's hyperparameters give 86.15M parameters, not 64M. mlp: SiLU and dropout after each of
    `depth` hidden layers. Raises ValueError where the configuration does not fit the latent.
    """
    check_classifier(config, latent_shape)
    if config.kind == "mlp":
        return VectorClassifier(math.prod(latent_shape), config.width, config.depth, config.dropout, classes)
    from timm.models.vision_transformer import VisionTransformer

    channels = config.token_channels or latent_shape[2]
    network = VisionTransformer(
        img_size=(token_count(config, latent_shape), 1),
        patch_size=1,
        in_chans=channels,
        num_classes=classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        global_pool="avg",
        drop_rate=config.dropout,
    )
    return TokenClassifier(network, channels)


def check_classifier(config: ClassifierConfig, latent_shape: tuple[int, int, int]) -> None:
    """Raises ValueError, in one line, where the classifier does not fit latents [s, s, c]. Free of heavy imports."""
    channels = config.token_channels
    if channels is not None and latent_shape[2] % channels:
        raise ValueError(
            f"token_channels: a position's {latent_shape[2]} numbers cannot be cut into tokens of {channels}: choose a "
            f"divisor, or leave it empty"
        )


class PixelClassifier(nn.Module):
    """Convolutions that halve the image down to 4x4, then two linear layers: its features span a Frechet space.

    Group, not batch, normalisation: the features of an image do not depend on its neighbours in the batch.
    """

    def __init__(self, width: int, features: int, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        layers = _convolution(channels, width, stride=1)
        wide, side = width, resolution
        while side > 4:
            wider = min(2 * wide, 4 * width)
            layers += _convolution(wide, wider, stride=2)
            wide, side = wider, math.ceil(side / 2)
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.penultimate = nn.Linear(4 * wide, features)
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] in [0, 1] -> penultimate features [B, features]."""
        x = self.trunk(images.permute(0, 3, 1, 2) * 2 - 1)  # [B, ch, H, W] -> [B, 4 wide]
        return F.silu(self.penultimate(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, H, W, ch] in [0, 1] -> logits [B, K]."""
        return cast(Tensor, self.head(self.features(images)))


def _convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1)
    return [convolution, nn.GroupNorm(math.gcd(8, channels_out), channels_out), nn.SiLU()]


def build_pixel_classifier(width: int, features: int, channels: int, resolution: int, classes: int) -> PixelClassifier:
    """A small classifier of square images of `resolution` pixels a side; `.features` is its penultimate layer."""
    return PixelClassifier(width, features, channels, resolution, classes)


def classification_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [B, K] and labels int64 [B], with label smoothing (0.1 in App. C)."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: decay on matrices and kernels; none on norms, biases and position embeddings."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith("pos_embed")
        (decayed if matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of every linear layer but the last one, the head: what an optimiser may treat as matrices.

    A Transformer's token embedding is a convolution, its positions a parameter of their own: neither is among them.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [layer.get_parameter("weight") for layer in layers[:-1]]
