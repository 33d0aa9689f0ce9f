"""Speech files of any rate, and mel frames at true length equal to those of the padded mel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from llama_omni.speech.audio import audio_duration, load_audio, save_audio
from llama_omni.speech.whisper_mel import compute_mel, num_mel_frames, num_speech_tokens


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80)


def speech(seconds: float, *, seed: int = 0, rate: int = 16000) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * rate), generator=noise)


# Mel frames.


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 160, 16_001, 120_123, 479_999, 480_000])
def test_true_length_mel_is_the_padded_mel_cut(n_mels: int, num_samples: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    waveform = speech(30.0)[:num_samples]
    mel = compute_mel(waveform, extractor)
    official = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    padded = compute_mel(waveform, extractor, pad_to_30s=True)
    assert torch.equal(padded, official[0])
    assert padded.shape == (n_mels, 3000)
    assert mel.shape == (n_mels, num_mel_frames(num_samples))
    torch.testing.assert_close(mel, padded[:, : mel.shape[1]], rtol=0, atol=1e-5)


def test_frame_and_token_counts() -> None:
    assert [num_mel_frames(n) for n in (1, 320, 321, 120_000, 480_000)] == [2, 2, 4, 750, 3000]
    # 7.5 s: 750 frames -> 375 encoder states -> 75 tokens; 30 s: 300 tokens, as official.
    counts = [num_speech_tokens(n, ds_rate=5) for n in (8, 10, 750, 3000)]
    assert counts == [0, 1, 75, 300]


def test_too_long_speech_is_refused(extractor: WhisperFeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"30\.5 s of speech, over the 30 s"):
        compute_mel(speech(30.5), extractor)


def test_mel_is_fast(extractor: WhisperFeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 2 ms for the average question (7.5 s) on one core: one transform, not of 30 s."""
    lengths: list[int] = []
    stft = torch.stft

    def note(waveform: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(waveform.numel())
        return stft(waveform, *args, **options)

    monkeypatch.setattr(torch, "stft", note)
    compute_mel(speech(7.5), extractor)
    assert lengths == [120_000 + extractor.n_fft]


# Audio files.


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".flac"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_audio_of_any_rate_is_read_as_16_khz(tmp_path: Path, suffix: str, rate: int) -> None:
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)
    path = tmp_path / f"tone{suffix}"
    save_audio(path, tone, sample_rate=rate)
    waveform = load_audio(path)
    assert waveform.dtype == torch.float32
    assert waveform.ndim == 1
    assert abs(len(waveform) - 16000) <= 16000 * 0.15 * (suffix == ".mp3")  # mp3 adds whole frames
    assert abs(audio_duration(path) - 1.0) < 0.15
    middle = waveform[4000:12000]
    spectrum = torch.fft.rfft(middle).abs()
    assert spectrum.argmax() == 220  # 440 Hz in bins of 2 Hz
    assert middle.abs().max() == pytest.approx(0.5, abs=0.03)


def test_stereo_is_averaged_and_odd_rates_work(tmp_path: Path) -> None:
    left = speech(0.2, rate=47999)
    soundfile.write(tmp_path / "s.wav", torch.stack([left, -left], dim=1).numpy(), 47999)
    waveform = load_audio(tmp_path / "s.wav")
    assert waveform.abs().max() < 1e-4
    assert abs(len(waveform) - 3200) <= 1


def test_unusable_audio_names_the_file(tmp_path: Path) -> None:
    save_audio(tmp_path / "none.wav", torch.zeros(0), sample_rate=16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio")
    for name, message in (
        ("none.wav", "zero-length"),
        ("nan.wav", "NaN or infinite"),
        ("empty.wav", "zero-length"),
        ("text.wav", "not readable as wav, mp3 or flac"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            load_audio(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.wav: no such"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match=r"use \.wav, \.mp3, \.flac"):
        save_audio(tmp_path / "a.ogg", torch.zeros(5), sample_rate=16000)
