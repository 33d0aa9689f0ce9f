"""Decodes semantic and acoustic codes: embeddings -> LSTM -> transposed convolutions -> speech.

It is last in the data flow. Source: `networks/decoders/mem_decoders.py` and
`LongCatAudioCodecDecoder` of LongCat-Audio-Codec.

The 24 kHz decoders look three frames (180 ms) ahead, in their first convolution. The 16 kHz one
looks further: its other convolutions are not causal.

B batch, C channels, N frames, T samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.layers import (
    NormedConv1d,
    NormedConvTranspose1d,
    ResidualUnit,
    Snake1d,
)
from vss_longcat_omni.speech.longcat_codec.quantizer import ResidualQuantizer

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import DecoderConfig

LOOK_AHEAD = 3  # frames


class Memory(nn.Module):
    """Has two LSTMs, each with a norm, and no residual path. (B, C, N) -> (B, C, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lstm_list1 = nn.ModuleList([nn.LSTM(channels, channels, batch_first=True)])
        self.lstm_list2 = nn.ModuleList([nn.LSTM(channels, channels, batch_first=True)])
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln1(self.lstm_list1[0](x.transpose(1, 2))[0])
        return self.ln2(self.lstm_list2[0](x)[0]).transpose(1, 2)


class DecoderBlock(nn.Module):
    """Maps (B, C, T) to (B, C / 2, T * stride)."""

    def __init__(self, channels: int, stride: int, *, is_causal: bool) -> None:
        super().__init__()
        half = channels // 2
        if is_causal:
            grow = NormedConvTranspose1d(channels, half, stride, stride=stride)
        else:
            grow = NormedConvTranspose1d(
                channels, half, 2 * stride, stride=stride, padding=math.ceil(stride / 2),
                output_padding=stride % 2,
            )  # fmt: skip
        units = [ResidualUnit(half, dilation, is_causal=is_causal) for dilation in (1, 3, 9)]
        self.block = nn.Sequential(Snake1d(channels), grow, *units)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class MemoryDecoder(nn.Module):
    def __init__(self, in_channels: int, config: DecoderConfig) -> None:
        super().__init__()
        is_causal = config.is_causal
        self.mem_layers = nn.ModuleList([Memory(in_channels)])
        channels = [config.width // 2**number for number in range(len(config.rates) + 1)]
        self.model = nn.Sequential(
            NormedConv1d(in_channels, channels[0], 2 * LOOK_AHEAD + 1, padding=LOOK_AHEAD),
            *(
                DecoderBlock(c, rate, is_causal=is_causal)
                for c, rate in zip(channels, config.rates, strict=False)
            ),
            Snake1d(channels[-1]),
            *([nn.ZeroPad1d((6, 0))] if is_causal else []),
            NormedConv1d(channels[-1], 1, 7, padding=0 if is_causal else 3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Decode (B, C, N) to (B, T) in [-1, 1]."""
        for memory in self.mem_layers:
            x = memory(x)
        return self.model(x).squeeze(1)


class SemanticEmbedding(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.dequant = nn.Embedding(size, dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed (B, N) to (B, C, N)."""
        return self.dequant(codes).transpose(1, 2)


class LongCatDecoder(nn.Module):
    """What a decoder checkpoint holds."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = MemoryDecoder(config.semantic_dim + config.quantizer.dim, config)
        self.acoustic_quantizer = ResidualQuantizer(config.quantizer)
        self.semantic_dequantizer = SemanticEmbedding(config.semantic_size, config.semantic_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Decode (B, N, 1 + Q) codes, Q from 1 to the decoder's codebooks, to (B, T)."""
        semantic = self.semantic_dequantizer(codes[..., 0])
        acoustic = self.acoustic_quantizer.embed(codes[..., 1:].transpose(1, 2))
        return self.decoder(torch.cat((semantic, acoustic), dim=1))
