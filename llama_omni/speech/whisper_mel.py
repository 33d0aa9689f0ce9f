"""Computes Whisper's mel frames of waveforms, and how many LLM positions a clip takes.

Second step of the data flow: `audio.py` reads the file, `data_utils.py` collates what comes out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import WhisperFeatureExtractor


def num_mel_frames(num_samples: int, *, hop_length: int = 160) -> int:
    """Counts the mel frames of a clip at 16 kHz, rounded up to an even number.

    Whisper's second convolution steps by two. With an even count its last window ends on the clip's
    own last frame, so a longer clip in the batch changes nothing.
    """
    return 2 * math.ceil(num_samples / (2 * hop_length))


def num_speech_tokens(mel_frames: int, *, ds_rate: int) -> int:
    """Counts the LLM positions of a clip: half the frames leave the encoder, `ds_rate` make one."""
    return (mel_frames + 1) // 2 // ds_rate


def load_feature_extractor(folder: Path, *, mel_size: int) -> WhisperFeatureExtractor:
    """Loads the folder's own, else Whisper's: released LLaMA-Omni checkpoints hold none."""
    from transformers import WhisperFeatureExtractor

    if (folder / "preprocessor_config.json").is_file():
        return WhisperFeatureExtractor.from_pretrained(folder)
    return WhisperFeatureExtractor(feature_size=mel_size)


def compute_mel(
    waveform: torch.Tensor, feature_extractor: Any, *, pad_to_30s: bool = False
) -> torch.Tensor:
    """Returns (n_mels, num_frames) log-mel of (num_samples,) by a WhisperFeatureExtractor.

    The length is the true one by default: the very frames that the clip has in the mel padded to
    30 s, which is why silence is appended first and cut off after. Raises ValueError beyond 30 s.
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
