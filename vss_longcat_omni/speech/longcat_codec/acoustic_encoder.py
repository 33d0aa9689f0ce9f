"""Acoustic encoder: waveform -> 16.67 vectors a second, which `quantizer.py` turns into codes.

Source: `networks/modules/model.py` of LongCat-Audio-Codec. Not causal.

B batch, T samples at 16 kHz, N = T / 960 frames, C width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.config import HOP
from vss_longcat_omni.speech.longcat_codec.layers import (
    NormedConv1d,
    ResidualUnit,
    Snake1d,
    run_masked,
)

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import EncoderConfig


class EncoderBlock(nn.Module):
    """(B, C, T) -> (B, 2C, T / stride), for T a multiple of the stride."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        units = [ResidualUnit(channels, dilation, is_causal=False) for dilation in (1, 3, 9)]
        shrink = NormedConv1d(
            channels, 2 * channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2)
        )
        self.block = nn.Sequential(*units, Snake1d(channels), shrink)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return run_masked(self.block, x, mask)


class AcousticEncoder(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        channels = [config.width * 2**number for number in range(len(config.rates) + 1)]
        self.block = nn.Sequential(
            NormedConv1d(1, channels[0], 7, padding=3),
            *(EncoderBlock(c, rate) for c, rate in zip(channels, config.rates, strict=False)),
            Snake1d(channels[-1]),
            NormedConv1d(channels[-1], config.quantizer.dim, 3, padding=1),
        )

    def forward(self, waveforms: Tensor, num_codes: Tensor | None = None) -> Tensor:
        """(B, T), T a multiple of 960 -> (B, C, N).

        `num_codes` (B,): frames of each clip. What lies behind is never seen, and the vectors that
        stand for it mean nothing.
        """
        x = waveforms.unsqueeze(1)
        first, *blocks, snake, last = self.block
        mask = frame_mask(num_codes, x.shape[-1])
        x = run_masked([first], x, mask)
        for block in blocks:
            x = block(x, mask)
            mask = None if mask is None else mask[..., :: block.stride]
        return run_masked([snake, last], x, mask)


def frame_mask(num_codes: Tensor | None, num_samples: int) -> Tensor | None:
    """(B, 1, T), True at the samples of the clips' own frames."""
    if num_codes is None:
        return None
    num_valid = num_codes[:, None, None] * HOP
    return torch.arange(num_samples, device=num_codes.device) < num_valid
