"""Encodes speech to 1 semantic and 3 acoustic codes a frame, by what the checkpoint holds.

Source: `LongCatAudioCodecEncoder` of LongCat-Audio-Codec. The two paths share nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.acoustic_encoder import AcousticEncoder
from vss_longcat_omni.speech.longcat_codec.quantizer import ResidualQuantizer
from vss_longcat_omni.speech.longcat_codec.semantic_encoder import SemanticTokenizer

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import EncoderConfig


class LongCatEncoder(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AcousticEncoder(config)
        self.acoustic_quantizer = ResidualQuantizer(config.quantizer)
        self.semantic_tokenizer = SemanticTokenizer(config.semantic)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encode (B, T) in [-1, 1], T a multiple of 960, to (B, T / 960, 1 + codebooks) int64."""
        semantic = self.semantic_tokenizer(waveforms)  # (B, N)
        acoustic = self.acoustic_quantizer.encode(self.encoder(waveforms))  # (B, Q, N)
        return torch.cat((semantic.unsqueeze(-1), acoustic.transpose(1, 2)), dim=-1)
