"""Speech files (wav, mp3, flac) -> mono waveforms, or what is wrong with them; and back to files.

First step of the data flow: a sample's speech -> waveform -> features or codes. libsndfile reads
and writes; torchaudio only resamples, since its loaders need an FFmpeg build.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import soundfile
import torch

AUDIO_SUFFIXES = (".wav", ".mp3", ".flac")
MAX_KERNEL_SIZE = 10_000_000  # entries of the polyphase filter; 44.1 kHz -> 16 kHz has 70,000


def load_audio(path: Path, *, sample_rate: int = 16000) -> torch.Tensor:
    """(num_samples,) float32 mono in [-1, 1] at `sample_rate`; several channels are averaged.

    Raises FileNotFoundError, or ValueError for unreadable, zero-length or non-finite audio.
    """
    waveform, file_rate = read_mono(path)
    return resample(waveform, file_rate, sample_rate)


def read_mono(path: Path) -> tuple[torch.Tensor, int]:
    """(num_samples,) float32 mono at the file's own rate, and that rate; errors as `load_audio`."""
    path = Path(path)
    try:
        samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise _read_error(path, error) from error
    if len(samples) == 0:
        raise ValueError(f"{path}: zero-length audio")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError(f"{path}: the audio holds NaN or infinite samples")
    return torch.from_numpy(np.ascontiguousarray(mono)), file_rate


def resample(waveform: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """(num_samples,) at `to_rate`; the length is ceil(num_samples * to_rate / from_rate)."""
    if from_rate == to_rate:
        return waveform
    divisor = math.gcd(from_rate, to_rate)
    if (from_rate // divisor) * (to_rate // divisor) > MAX_KERNEL_SIZE:
        # torchaudio tabulates the filter for every phase: gigabytes for rates such as 47999 Hz.
        import librosa

        resampled = librosa.resample(waveform.numpy(), orig_sr=from_rate, target_sr=to_rate)
        return torch.from_numpy(resampled)
    import torchaudio.functional as audio_functional

    return audio_functional.resample(waveform, from_rate, to_rate)


def save_audio(path: Path, waveform: torch.Tensor, *, sample_rate: int) -> None:
    """Writes (num_samples,) in [-1, 1] (clipped) as the suffix says: 16-bit wav, flac, or mp3."""
    path = Path(path)
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        raise ValueError(f"{path}: cannot write '{path.suffix}'; use {', '.join(AUDIO_SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = waveform.detach().float().clamp(-1.0, 1.0).cpu().numpy()
    try:
        soundfile.write(path, samples, sample_rate)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: cannot be written at {sample_rate} Hz: {error}") from error


def audio_duration(path: Path) -> float:
    """Seconds, from the header alone (0.0 for zero-length audio); errors as `load_audio`."""
    path = Path(path)
    try:
        with soundfile.SoundFile(path) as file:
            return file.frames / file.samplerate
    except soundfile.SoundFileError as error:
        raise _read_error(path, error) from error


def _read_error(path: Path, error: Exception) -> Exception:
    try:
        size = path.stat().st_size
    except OSError:
        return FileNotFoundError(f"{path}: no such audio file")
    if size == 0:
        return ValueError(f"{path}: zero-length audio (the file is empty)")
    return ValueError(f"{path}: not readable as wav, mp3 or flac ({error})")
