"""Computes log-mel frames, which the embedded codec quantizes, and the way back to a waveform.

`embedded_codec.py` uses both directions. Windows of 40 ms come every 10 ms: six such frames make
one codec frame of 60 ms, and lie symmetrically in it.

S samples, T mel frames.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000
N_FFT = 640
HOP = 160
NUM_MELS = 80
# Magnitudes below are silence. It comes back as a soft noise, as of a quiet room: speech
# recognizers do worse on speech between zeros.
FLOOR = 1e-3
IDENTITY = f"log_mel n_fft={N_FFT} hop={HOP} mels={NUM_MELS} floor={FLOOR}"

GRIFFIN_LIM_ROUNDS = 32
MOMENTUM = 0.99
INVERSION_ROUNDS = 30
MIN_MAGNITUDE = 1e-8  # keeps divisions finite


def compute_log_mel(waveform: Tensor) -> Tensor:
    """Compute (ceil(S / HOP), NUM_MELS) from (S,), each centered on its HOP samples."""
    num_frames = math.ceil(len(waveform) / HOP)
    before = (N_FFT - HOP) // 2
    after = N_FFT + (num_frames - 1) * HOP - before - len(waveform)
    spectrum = torch.stft(
        F.pad(waveform, (before, after)),
        N_FFT,
        HOP,
        window=_window(waveform.device),
        center=False,
        return_complex=True,
    )
    mel = spectrum.abs().T @ mel_filters().to(waveform.device)  # (T, NUM_MELS)
    return mel.clamp(min=FLOOR).log()


def invert_log_mel(log_mel: Tensor) -> Tensor:
    """Return for (T, NUM_MELS) the (T, N_FFT // 2 + 1) magnitudes >= 0 whose mel is nearest.

    Non-negative least squares by multiplicative updates (Lee and Seung, "Algorithms for
    non-negative matrix factorization", 2000), from the pseudo-inverse.
    """
    mel, filters = log_mel.exp(), mel_filters().to(log_mel.device)
    magnitudes = (mel @ torch.linalg.pinv(filters)).clamp(min=MIN_MAGNITUDE)
    wanted, gram = mel @ filters.T, filters @ filters.T
    for _ in range(INVERSION_ROUNDS):
        magnitudes = magnitudes * wanted / (magnitudes @ gram).clamp(min=MIN_MAGNITUDE)
    return magnitudes


def griffin_lim(magnitudes: Tensor) -> Tensor:
    """Turn (T, N_FFT // 2 + 1) into (T * HOP,) samples, the same at every call.

    Fast Griffin-Lim (Perraudin, Balazs and Soendergaard, "A fast Griffin-Lim algorithm", 2013).
    """
    magnitudes = magnitudes.T.contiguous()  # (bins, T)
    generator = torch.Generator().manual_seed(0)  # of the CPU: equal on every device
    angles = 2 * math.pi * torch.rand(magnitudes.shape, generator=generator)
    spectrum = torch.polar(magnitudes, angles.to(magnitudes.device))
    last = torch.zeros_like(spectrum)
    for _ in range(GRIFFIN_LIM_ROUNDS):
        consistent = _forward(_backward(spectrum))
        sped_up = consistent + MOMENTUM * (consistent - last)
        spectrum = magnitudes * sped_up / sped_up.abs().clamp(min=MIN_MAGNITUDE)
        last = consistent
    return _backward(spectrum)[HOP // 2 : -(HOP // 2)]


def _backward(spectrum: Tensor) -> Tensor:
    """Map (bins, T) to ((T + 1) * HOP,): half a hop more on either side, by empty frames."""
    return torch.istft(
        F.pad(spectrum, (1, 1)),
        N_FFT,
        HOP,
        window=_window(spectrum.device),
        length=(spectrum.shape[1] + 1) * HOP,
    )


def _forward(waveform: Tensor) -> Tensor:
    """Map ((T + 1) * HOP,) back to (bins, T)."""
    spectrum = torch.stft(
        waveform,
        N_FFT,
        HOP,
        window=_window(waveform.device),
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum[:, 1:-1]


@lru_cache(maxsize=4)
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """Return (N_FFT // 2 + 1, NUM_MELS) triangles of Slaney's scale and area, 0 to 8 kHz."""
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(
        N_FFT // 2 + 1,
        0.0,
        SAMPLE_RATE / 2,
        NUM_MELS,
        SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
