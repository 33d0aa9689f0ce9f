"""Speech files (wav, mp3, flac) to mono waveforms, and these to files and Whisper mel frames.

First step of the data flow: file -> waveform -> mel (for data_utils.py) or units (quantizer.py).
libsndfile reads and writes; torchaudio only resamples, since its loaders need an ffmpeg build.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

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


def num_mel_frames(num_samples: int, *, hop_length: int = 160) -> int:
    """Mel frames of a clip at 16 kHz, rounded up to an even number.

    Whisper's second convolution steps by two. With an even count its last window ends on the clip's
    own last frame, so a longer clip in the batch changes nothing.
    """
    return 2 * math.ceil(num_samples / (2 * hop_length))


def num_speech_tokens(mel_frames: int, *, ds_rate: int) -> int:
    """LLM positions of a clip: half the frames leave the encoder, `ds_rate` of these make one."""
    return (mel_frames + 1) // 2 // ds_rate


def load_feature_extractor(folder: Path, *, mel_size: int) -> WhisperFeatureExtractor:
    """The folder's own, else Whisper's settings: released LLaMA-Omni checkpoints hold none."""
    from transformers import WhisperFeatureExtractor

    if (folder / "preprocessor_config.json").is_file():
        return WhisperFeatureExtractor.from_pretrained(folder)
    return WhisperFeatureExtractor(feature_size=mel_size)


def compute_mel(
    waveform: torch.Tensor, feature_extractor: Any, *, pad_to_30s: bool = False
) -> torch.Tensor:
    """(n_mels, num_frames) log-mel of a (num_samples,) waveform, by a WhisperFeatureExtractor.

    True length by default: the very frames that the clip has in the mel padded to 30 s, which is
    why silence is appended first and cut off after. Raises ValueError beyond 30 s.
    """
    limit, sample_rate = feature_extractor.n_samples, feature_extractor.sampling_rate
    if len(waveform) > limit:
        raise ValueError(
            f"{len(waveform) / sample_rate:.1f} s of speech, over the {limit / sample_rate:g} s "
            "that Whisper takes: cut it"
        )
    hop_length = feature_extractor.hop_length
    num_frames = num_mel_frames(len(waveform), hop_length=hop_length)
    padded = min(num_frames * hop_length + feature_extractor.n_fft, limit)
    features = feature_extractor(
        waveform.numpy(),
        sampling_rate=sample_rate,
        max_length=limit if pad_to_30s else padded,
        return_tensors="pt",
    ).input_features[0]
    return features if pad_to_30s else features[:, :num_frames].contiguous()


def _read_error(path: Path, error: Exception) -> Exception:
    try:
        size = path.stat().st_size
    except OSError:
        return FileNotFoundError(f"{path}: no such audio file")
    if size == 0:
        return ValueError(f"{path}: zero-length audio (the file is empty)")
    return ValueError(f"{path}: not readable as wav, mp3 or flac ({error})")
