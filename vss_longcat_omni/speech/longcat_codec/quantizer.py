"""Acoustic codes: vectors -> residual books of two groups each -> codes, and back to vectors.

Between `acoustic_encoder.py` and the codes, and between the codes and `decoder.py` (each of the two
checkpoints has its own). Source: `networks/quantizers/auto_grvq.py` of LongCat-Audio-Codec.

A book looks up two entries of 90 in its own learned 8 dimensions each, by angle; code = 90 a + b.

B batch, D width, N frames, Q books.
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
    """One book: group a makes the first half of the vector, group b the second."""

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
        """(B, D, N) -> (B, N) codes."""
        a = nearest_angle(self.in_proj_a(vectors), self.codebook_a.weight)
        b = nearest_angle(self.in_proj_b(vectors), self.codebook_b.weight)
        return a * self.codebook_size + b

    def embed(self, codes: Tensor) -> Tensor:
        """(B, N) -> (B, D, N)."""
        a = self.codebook_a(codes // self.codebook_size).transpose(1, 2)  # (B, 8, N)
        b = self.codebook_b(codes % self.codebook_size).transpose(1, 2)
        return torch.cat((self.out_proj_a(a), self.out_proj_b(b)), dim=1)


class ResidualQuantizer(nn.Module):
    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(GroupQuantizer(config) for _ in range(config.num_codebooks))

    def encode(self, vectors: Tensor) -> Tensor:
        """(B, D, N) -> (B, Q, N); each book describes what those before it left over."""
        codes = []
        for quantizer in self._books():
            codes.append(quantizer.encode(vectors))
            vectors = vectors - quantizer.embed(codes[-1])
        return torch.stack(codes, dim=1)

    def embed(self, codes: Tensor) -> Tensor:
        """(B, Q, N) -> (B, D, N), of the first Q books: the more, the finer."""
        books = zip(self._books(), codes.unbind(1), strict=False)
        return torch.stack([quantizer.embed(book) for quantizer, book in books]).sum(0)

    def _books(self) -> list[GroupQuantizer]:
        return list(self.quantizers)  # pyright: ignore


def nearest_angle(vectors: Tensor, entries: Tensor) -> Tensor:
    """(B, d, N), (E, d) -> (B, N): the entry at the least angle."""
    return nearest(F.normalize(vectors.transpose(1, 2), dim=-1), F.normalize(entries, dim=-1))
