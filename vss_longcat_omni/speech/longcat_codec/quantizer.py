"""Quantizes vectors to acoustic codes by residual codebooks of two groups each, and back.

It is between `acoustic_encoder.py` and the codes, and between the codes and `decoder.py` (each of
the two checkpoints has its own). Source: `networks/quantizers/auto_grvq.py` of LongCat-Audio-Codec.

A codebook looks up two entries of 90 in its own learned 8 dimensions each, by angle; the code is
90 a + b.

B batch, D width, N frames, Q codebooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vss_longcat_omni.speech.longcat_codec.layers import NormedConv1d, nearest

if TYPE_CHECKING:
    from vss_longcat_omni.speech.longcat_codec.config import QuantizerConfig


class GroupQuantizer(nn.Module):
    """One codebook: group a makes the first half of the vector, group b the second."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        dim, codebook_dim = config.dim, config.codebook_dim
        self.in_proj_a = NormedConv1d(dim, codebook_dim, 1)
        self.out_proj_a = NormedConv1d(codebook_dim, dim // 2, 1)
        self.in_proj_b = NormedConv1d(dim, codebook_dim, 1)
        self.out_proj_b = NormedConv1d(codebook_dim, dim // 2, 1)
        self.codebook_a = nn.Embedding(config.codebook_size, codebook_dim)
        self.codebook_b = nn.Embedding(config.codebook_size, codebook_dim)

    def encode(self, vectors: Tensor) -> Tensor:
        """Encode (B, D, N) to codes (B, N)."""
        a = nearest_angle(self.in_proj_a(vectors), self.codebook_a.weight)
        b = nearest_angle(self.in_proj_b(vectors), self.codebook_b.weight)
        return a * self.codebook_size + b

    def embed(self, codes: Tensor) -> Tensor:
        """Embed (B, N) to (B, D, N)."""
        a = self.codebook_a(codes // self.codebook_size).transpose(1, 2)  # (B, 8, N)
        b = self.codebook_b(codes % self.codebook_size).transpose(1, 2)
        return torch.cat((self.out_proj_a(a), self.out_proj_b(b)), dim=1)


class ResidualQuantizer(nn.Module):
    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(GroupQuantizer(config) for _ in range(config.num_codebooks))

    def encode(self, vectors: Tensor) -> Tensor:
        """Encode (B, D, N) to (B, Q, N); each codebook describes what those before it left over."""
        codes = []
        for quantizer in self._codebooks():
            codes.append(quantizer.encode(vectors))
            vectors = vectors - quantizer.embed(codes[-1])
        return torch.stack(codes, dim=1)

    def embed(self, codes: Tensor) -> Tensor:
        """Embed (B, Q, N) to (B, D, N), by the first Q codebooks: the more, the finer."""
        pairs = zip(self._codebooks(), codes.unbind(1), strict=False)
        return torch.stack([quantizer.embed(own) for quantizer, own in pairs]).sum(0)

    def _codebooks(self) -> list[GroupQuantizer]:
        return list(self.quantizers)  # pyright: ignore


def nearest_angle(vectors: Tensor, entries: Tensor) -> Tensor:
    """Find the entry (B, N) of (E, d) at the least angle to (B, d, N)."""
    return nearest(F.normalize(vectors.transpose(1, 2), dim=-1), F.normalize(entries, dim=-1))
