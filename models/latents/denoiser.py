"""Denoisers: ADM's UNet (Dhariwal & Nichol 2021; Table 6), which diffusers' UNet2DModel is, and ResidualMLP (B.1)."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from functa.models.config import DenoiserConfig
from functa.models.latents.cost import SINUSOID
from functa.models.latents.dropout import Dropout


class Denoiser(nn.Module):
    """Takes channels-last latents to a UNet that wants [B, c, s, s]."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy latents [B, s, s, c], times [B], labels int64 [B] (K: no label) -> noise [B, s, s, c].

        A network with classes always wants labels, one without never (ValueError).
        """
        noise = self.unet(x.permute(0, 3, 1, 2), t, class_labels=labels, return_dict=False)[0]  # [B, c, s, s]
        return cast(Tensor, noise.permute(0, 2, 3, 1))  # [B, s, s, c]


class ResidualMLP(nn.Module):
    """Residual blocks of linear layers on the latent's numbers (App. B.1, after Dupont et al. 2022a).

    The paper names it and gives widths and numbers of blocks. The positions of norms, activations and the time
    embedding are our reading; so is the embedding of labels beside the time, as in the UNet.
    """

    def __init__(self, numbers: int, config: DenoiserConfig, classes: int | None) -> None:
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        width = config.channels
        self.sinusoid = Timesteps(SINUSOID, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(SINUSOID, width)
        self.labels = None if classes is None else nn.Embedding(classes + 1, width)
        self.begin = nn.Linear(numbers, width)
        self.blocks = nn.ModuleList(_ResidualBlock(width, config) for _ in range(config.blocks))
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.end = _zeroed(nn.Linear(width, numbers))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy latents [B, s, s, c], times [B], labels int64 [B] (K: no label) -> noise [B, s, s, c].

        A network with classes always wants labels, one without never (ValueError).
        """
        if (self.labels is None) != (labels is None):
            raise ValueError("labels are for a conditional denoiser, and it always wants them")
        embedding = self.time(self.sinusoid(t).to(x.dtype))  # [B, width]
        if self.labels is not None:
            embedding = embedding + self.labels(labels)
        embedding = F.silu(embedding)
        hidden = self.begin(x.flatten(1))  # [B, numbers] -> [B, width]
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return cast(Tensor, self.end(F.silu(self.norm(hidden))).view_as(x))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(config.groups, width, eps=1e-5) for _ in range(2))
        self.linears = nn.ModuleList([nn.Linear(width, width), _zeroed(nn.Linear(width, width))])
        self.time = nn.Linear(width, width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x and activated embedding, [B, width] each -> [B, width]."""
        hidden = self.linears[0](F.silu(self.norms[0](x))) + self.time(embedding)
        return cast(Tensor, x + self.linears[1](self.dropout(F.silu(self.norms[1](hidden)))))


def build_denoiser(
    config: DenoiserConfig, latent_shape: tuple[int, int, int], classes: int | None, time_numbers: int | None = None
) -> nn.Module:
    """The noise-predicting network. With classes it has K + 1 label embeddings: id K is the dummy of guidance.

    Attention is given by resolution (8 = on the 8x8 level), as ADM's flags are read. What ADM starts at zero starts at
    zero. `time_numbers` is the width of a UNet's sinusoid: None for ADM's, the base channels; earlier versions had that
    of the finest level. Raises ValueError where the configuration does not fit the latent.
    """
    check_denoiser(config, latent_shape)
    if config.kind == "mlp":
        return ResidualMLP(math.prod(latent_shape), config, classes)
    from diffusers import UNet2DModel
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    attends = [latent_shape[0] >> level in config.attention for level in range(len(config.multipliers))]
    unet: Any = UNet2DModel(
        sample_size=latent_shape[0],
        in_channels=latent_shape[2],
        out_channels=latent_shape[2],
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.multipliers),
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.head_channels,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,  # None would remove the middle attention's norm
        norm_eps=1e-5,
        time_embedding_dim=4 * config.channels,
        num_class_embeds=None if classes is None else classes + 1,
        dropout=config.dropout,
    )
    numbers = time_numbers or config.channels
    if numbers != config.channels * config.multipliers[0]:  # what diffusers takes
        unet.time_proj = Timesteps(numbers, flip_sin_to_cos=True, downscale_freq_shift=0)
        unet.time_embedding = TimestepEmbedding(numbers, 4 * config.channels)
    _start_at_zero(unet)
    return Denoiser(unet)


def time_numbers(weights: Mapping[str, Tensor]) -> int | None:
    """Return the width of the sinusoid that a UNet's weights were trained with; None for those of a ResidualMLP."""
    first = weights.get("unet.time_embedding.linear_1.weight")
    return None if first is None else first.shape[1]


def check_denoiser(config: DenoiserConfig, latent_shape: tuple[int, int, int]) -> None:
    """Raises ValueError, in one line, where the UNet does not fit latents [s, s, c]. Free of heavy imports."""
    if config.kind == "mlp":
        return
    spatial, levels = latent_shape[0], len(config.multipliers)
    if spatial % 2 ** (levels - 1):
        raise ValueError(
            f"multipliers: {levels} levels halve the latent {levels - 1} times, but s = {spatial} is not divisible by "
            f"{2 ** (levels - 1)}: choose fewer multipliers"
        )
    resolutions = [spatial >> level for level in range(levels)]
    for resolution in config.attention:
        if resolution not in resolutions:
            raise ValueError(
                f"attention: resolution {resolution} is no level of this UNet: choose among "
                f"{', '.join(map(str, resolutions))}"
            )
    for resolution, multiplier in zip(resolutions, config.multipliers, strict=True):
        width = config.channels * multiplier
        attends = resolution in config.attention or resolution == resolutions[-1]  # the middle always attends
        if attends and width % config.head_channels:
            raise ValueError(
                f"head_channels: the {resolution}x{resolution} level has attention and {width} channels, which are no "
                f"multiple of {config.head_channels}: lower head_channels"
            )
    # At 1x1 a group of one number normalises to nothing, and the convolution that leads there has the width before.
    if resolutions[-1] == 1 and config.groups in [
        config.channels * multiplier for multiplier in config.multipliers[-2:]
    ]:
        raise ValueError(
            f"channels: the UNet ends at 1x1, where {config.groups} channels are {config.groups} groups of one number "
            f"each: use at least {2 * config.groups} channels on its last two levels"
        )


def _start_at_zero(unet: Any) -> None:
    """Zeroes what ADM zeroes: each residual block's 2nd convolution, each attention's output, the last convolution."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    last: list[Any] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        elif isinstance(module, Attention):
            last.append(module.to_out[0])
    for layer in last:
        _zeroed(layer)


def _zeroed(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
