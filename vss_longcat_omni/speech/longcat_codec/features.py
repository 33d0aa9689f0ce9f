"""Turns a waveform into normalized log mel energies, the semantic tokenizer's first step.

They are Kaldi's filter bank: frames of 25 ms every 10 ms, no dither, no removal of the mean.
Source: `semantic_tokenizer_general/feature_extractor.py` of LongCat-Audio-Codec.

B batch, T samples at 16 kHz in the range of 16-bit integers, F frames, M mel bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.compliance import kaldi

if TYPE_CHECKING:
    from pathlib import Path

EPS = torch.finfo(torch.float32).eps


def compute_fbank(waveforms: Tensor, num_mel_bins: int) -> Tensor:
    """Compute log mel energies (B, F, M) from (B, T); F = (T - 400) // 160 + 1, T at least 400."""
    clips = [
        kaldi.fbank(clip, num_mel_bins=num_mel_bins, low_freq=40, high_freq=7800,
                    remove_dc_offset=False)
        for clip in waveforms.split(1)
    ]  # fmt: skip
    return torch.stack(clips)


class Cmvn(nn.Module):
    """Takes the mean away and divides by the deviation, as counted over the training data."""

    cmvn_mean: Tensor  # (M,)
    cmvn_scale: Tensor  # (M,), one over the deviation

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("cmvn_mean", torch.zeros(num_mel_bins))
        self.register_buffer("cmvn_scale", torch.ones(num_mel_bins))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.cmvn_mean) * self.cmvn_scale

    def set_statistics(self, stats: np.ndarray) -> None:
        """Take (2, M + 1): sums and the count of frames; sums of squares and an unused entry."""
        count = stats[0, -1]
        mean = stats[0, :-1] / count
        variance = stats[1, :-1] / count - mean * mean
        self.cmvn_mean = torch.from_numpy(mean).float()
        self.cmvn_scale = 1.0 / torch.from_numpy(variance).float().sqrt().clamp(min=EPS)


class FeatureExtractor(nn.Module):
    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.num_mel_bins = num_mel_bins
        self.cmvn = Cmvn(num_mel_bins)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Extract features (B, F, M) from (B, T)."""
        return self.cmvn(compute_fbank(waveforms, self.num_mel_bins))


def read_cmvn_stats(path: Path, num_mel_bins: int) -> np.ndarray:
    """Read the statistics in a .npy file, for `Cmvn.set_statistics`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the encoder needs LongCatAudioCodec_encoder_cmvn.npy, "
            "released beside its checkpoint"
        )
    try:
        stats = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not readable as a .npy file of numbers: {error}") from error
    expected = (2, num_mel_bins + 1)
    if not isinstance(stats, np.ndarray) or stats.shape != expected:
        raise ValueError(f"{path}: shape {np.shape(stats)} instead of {expected}: wrong file")
    if not np.isfinite(stats).all() or stats[0, -1] <= 0:
        raise ValueError(f"{path}: the statistics hold NaN, or count no frame: damaged file")
    return stats
