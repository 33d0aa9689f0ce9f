"""Holds what several parts share: normed convolutions, snake, residual units, the nearest entry.

Source: `networks/modules/` of LongCat-Audio-Codec, after descriptinc/descript-audio-codec. Layers
without weights are in the lists as well: their places are in the official names.

B batch, C channels, T time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormedConv1d(nn.Module):
    """Convolves with `weight_v` scaled to norm `weight_g` along dimension 0."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1,
        dilation: int = 1, padding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size)
        self.weight_g, self.weight_v, self.bias = split_weight(conv)
        self.stride, self.dilation, self.padding = stride, dilation, padding

    def forward(self, x: Tensor) -> Tensor:
        weight = join_weight(self.weight_g, self.weight_v)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class NormedConvTranspose1d(nn.Module):
    """Transposes `NormedConv1d`; dimension 0 of its weight is its input."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int,
        padding: int = 0, output_padding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size)
        self.weight_g, self.weight_v, self.bias = split_weight(conv)
        self.stride, self.padding, self.output_padding = stride, padding, output_padding

    def forward(self, x: Tensor) -> Tensor:
        weight = join_weight(self.weight_g, self.weight_v)
        return F.conv_transpose1d(
            x, weight, self.bias, self.stride, self.padding, self.output_padding
        )


def split_weight(conv: nn.Conv1d | nn.ConvTranspose1d) -> tuple[nn.Parameter, ...]:
    """Return (weight_g, weight_v, bias) of a freshly initialized convolution."""
    weight = conv.weight.detach()
    assert conv.bias is not None
    norm = weight.norm(dim=(1, 2), keepdim=True)
    return nn.Parameter(norm), nn.Parameter(weight), nn.Parameter(conv.bias.detach())


def join_weight(weight_g: Tensor, weight_v: Tensor) -> Tensor:
    return weight_v * (weight_g / weight_v.norm(dim=(1, 2), keepdim=True))


class Snake1d(nn.Module):
    """Computes x + sin(alpha x)^2 / alpha, with an alpha for each channel; keeps zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)


class ResidualUnit(nn.Module):
    """Has two convolutions beside a residual path; causal ones look back only."""

    def __init__(self, channels: int, dilation: int, *, is_causal: bool) -> None:
        super().__init__()
        reach = 3 * dilation
        conv = NormedConv1d(
            channels, channels, 7, dilation=dilation, padding=0 if is_causal else reach
        )
        self.block = nn.Sequential(
            Snake1d(channels),
            *([nn.ZeroPad1d((2 * reach, 0))] if is_causal else []),
            conv,
            Snake1d(channels),
            NormedConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C, T)."""
        return x + self.block(x)


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Find the nearest entry (...) of (E, d) to (..., d), by |v|^2 + |e|^2 - 2 v e.

    |v|^2 decides nothing, but its rounding does where two entries are all but equally near; the
    official code has it.
    """
    squares = vectors.square().sum(-1, keepdim=True) + entries.square().sum(-1)
    return (squares - 2 * vectors @ entries.T).argmin(-1)
