"""First step of the semantic tokenizer: waveform -> log mel energies, normalised.

Kaldi's filter bank: frames of 25 ms every 10 ms, no dither, no removal of the mean. Source:
`semantic_tokenizer_general/feature_extractor.py` of LongCat-Audio-Codec.

B batch, T samples at 16 kHz in the range of 16-bit integers, F frames, M mel bins.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE_RATE = 16_000
WINDOW = 400  # samples a frame
SHIFT = 160  # samples from frame to frame
N_FFT = 512
PREEMPHASIS = 0.97
LOW_FREQ, HIGH_FREQ = 40.0, 7800.0  # Hz
EPS = torch.finfo(torch.float32).eps


class Fbank(nn.Module):
    """(B, T) -> (B, F, M) log mel energies; F = (T - 400) // 160 + 1, so T is 400 or more."""

    window: Tensor  # (400,)
    mel_banks: Tensor  # (257, M)
    eps: Tensor  # (), the floor under the energies

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW, periodic=False).pow(0.85))
        self.register_buffer("mel_banks", build_mel_banks(num_mel_bins))
        self.register_buffer("eps", torch.tensor(EPS))

    def forward(self, waveforms: Tensor) -> Tensor:
        frames = waveforms.unfold(-1, WINDOW, SHIFT)  # (B, F, 400)
        previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
        frames = (frames - PREEMPHASIS * previous) * self.window
        power = torch.fft.rfft(frames, n=N_FFT).abs().pow(2)  # (B, F, 257)
        return torch.maximum(power @ self.mel_banks, self.eps).log()


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
        """From (2, M + 1): sums and the count of frames; sums of squares and an unused entry."""
        count = stats[0, -1]
        mean = stats[0, :-1] / count
        variance = stats[1, :-1] / count - mean * mean
        self.cmvn_mean = torch.from_numpy(mean).float()
        self.cmvn_scale = 1.0 / torch.from_numpy(variance).float().sqrt().clamp(min=EPS)


class FeatureExtractor(nn.Module):
    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.fbank = Fbank(num_mel_bins)
        self.cmvn = Cmvn(num_mel_bins)

    def forward(self, waveforms: Tensor) -> Tensor:
        """(B, T) -> (B, F, M)."""
        return self.cmvn(self.fbank(waveforms))


def build_mel_banks(num_mel_bins: int) -> Tensor:
    """(257, M) triangles, evenly spaced in mel = 1127 ln(1 + Hz / 700). The last row is zero.

    In the official order of float32 operations: a code is the nearest of many entries.
    """

    def mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    low, high = mel(LOW_FREQ), mel(HIGH_FREQ)
    width = (high - low) / (num_mel_bins + 1)
    number = torch.arange(num_mel_bins)[:, None]  # (M, 1)
    left, centre, right = (low + (number + offset) * width for offset in (0.0, 1.0, 2.0))
    hertz = SAMPLE_RATE / N_FFT * torch.arange(N_FFT // 2)
    mels = (1127.0 * (1.0 + hertz / 700.0).log())[None]  # (1, 256)
    rise, fall = (mels - left) / (centre - left), (right - mels) / (right - centre)
    banks = torch.minimum(rise, fall).clamp(min=0.0)
    return nn.functional.pad(banks, (0, 1)).T.contiguous()


def read_cmvn_stats(path: Path, num_mel_bins: int) -> np.ndarray:
    """The statistics in a .npy file, for `Cmvn.set_statistics`.

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
