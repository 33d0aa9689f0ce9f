"""Encodes mel frames to semantic codes: convolutions -> transformer -> nearest of 8192 centroids.

It follows `features.py`; a code every 60 ms. Source: `semantic_tokenizer_general/encoder.py` of
LongCat-Audio-Codec, whose attention is not masked: a code depends on all speech.

B batch, T samples at 16 kHz, F mel frames, N codes, C width, H heads, D = C/H.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.features import FeatureExtractor
from vss_longcat_omni.speech.longcat_codec.layers import nearest

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import SemanticConfig

CONV_CHANNELS = 32
FULL_SCALE = 32767.0  # what the official code multiplies samples by, not 32768


class Subsampling(nn.Module):
    """Maps (B, F, M) to (B, N, C). Convolutions look back only."""

    def __init__(self, num_mel_bins: int, d_model: int) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}
        for number, stride in enumerate((2, 3)):
            channels = CONV_CHANNELS if number else 1
            layers[f"subsampling/pad{number}"] = nn.ZeroPad2d((0, 0, 2, 0))
            layers[f"subsampling/conv{number}"] = nn.Conv2d(channels, CONV_CHANNELS, 3, (stride, 1))
            layers[f"subsampling/relu{number}"] = nn.ReLU()
        self.conv = nn.Sequential(OrderedDict(layers))
        self.affine = nn.Linear(CONV_CHANNELS * (num_mel_bins - 4), d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features: Tensor) -> Tensor:
        x = self.conv(features.unsqueeze(1))  # (B, 32, N, M - 4)
        return self.norm(self.affine(x.transpose(1, 2).flatten(2)))


class SelfAttention(nn.Module):
    """Has the parameters of nn.MultiheadAttention."""

    def __init__(self, d_model: int, nhead: int) -> None:
        super().__init__()
        self.nhead = nhead
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, (B, N, C) to (B, N, C)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.nhead, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Normalizes first, and a third time the sum, which is what the next layer adds to."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.self_attn = SelfAttention(config.d_model, config.nhead)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return self.norm3(x)


class LayerStack(nn.Module):
    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VGGTransformer(nn.Module):
    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.subsampling = Subsampling(config.num_mel_bins, config.d_model)
        self.encoder = LayerStack(config)

    def forward(self, features: Tensor) -> Tensor:
        """Encode (B, F, M) to (B, N, C)."""
        x = self.subsampling(features)
        return self.encoder(x * math.sqrt(x.shape[-1]) + sinusoids(x))


class KMeans(nn.Module):
    codebook: Tensor  # (C, codebook_size)

    def __init__(self, d_model: int, codebook_size: int) -> None:
        super().__init__()
        codebook = torch.randn(d_model, codebook_size) / math.sqrt(codebook_size)
        self.register_buffer("codebook", codebook)

    def forward(self, states: Tensor) -> Tensor:
        """Encode (B, N, C) to codes (B, N). States are scaled to length 1, centroids are not."""
        return nearest(F.normalize(states, dim=-1), self.codebook.T)


class SemanticTokenizer(nn.Module):
    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor(config.num_mel_bins)
        self.model = VGGTransformer(config)
        self.kmeans = KMeans(config.d_model, config.codebook_size)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encode (B, T) in [-1, 1], T a multiple of 960, to codes (B, T / 960)."""
        features = self.feature_extractor(waveforms * FULL_SCALE)
        return self.kmeans(self.model(features))


def sinusoids(x: Tensor) -> Tensor:
    """Return the (N, C) position table for (B, N, C): sines and cosines in turn."""
    num_positions, width = x.shape[-2:]
    positions = torch.arange(num_positions, dtype=torch.float32, device=x.device)[:, None]
    even = torch.arange(0, width, 2, dtype=torch.float32, device=x.device)
    angles = positions * torch.exp(even * -(math.log(10000.0) / width))  # (N, C/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(x.dtype)
