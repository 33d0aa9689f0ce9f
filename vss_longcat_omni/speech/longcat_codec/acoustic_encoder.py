"""Encodes a waveform to 16.67 vectors a second, which `quantizer.py` turns into codes.

Source: `networks/modules/model.py` of LongCat-Audio-Codec. Not causal.

B batch, T samples at 16 kHz, N = T / 960 frames, C width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.layers import (
    NormedConv1d,
    ResidualUnit,
    Snake1d,
)

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import EncoderConfig


class EncoderBlock(nn.Module):
    """Maps (B, C, T) to (B, 2C, T / stride), for T a multiple of the stride."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        units = [ResidualUnit(channels, dilation, is_causal=False) for dilation in (1, 3, 9)]
        shrink = NormedConv1d(
            channels, 2 * channels, 2 * stride, stride=stride, padding=math.ceil(stride / 2)
        )
        self.block = nn.Sequential(*units, Snake1d(channels), shrink)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


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

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encode (B, T), T a multiple of 960, to (B, C, N)."""
        return self.block(waveforms.unsqueeze(1))
