"""Errors of the embedded codec and their messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from vss_longcat_omni.media.audio import save_audio
from vss_longcat_omni.speech.embedded_codec import FRAME_WIDTH, MelCodec
from vss_longcat_omni.speech.fit_codec import choose_codebook_sizes, fit_codec
from vss_longcat_omni.tools.fit_codec import find_recordings

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def noise_file(tmp_path: Path, noise: Tensor) -> Path:
    path = tmp_path / "noise.wav"
    save_audio(path, noise, sample_rate=16000)
    return path


def test_unusable_recordings_are_left_out_by_name(
    tmp_path: Path, noise_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    fit_codec([tmp_path / "broken.wav", noise_file, tmp_path / "absent.wav"], tmp_path / "codec")
    assert "left out: " in caplog.text
    assert "broken.wav: not readable" in caplog.text
    assert "absent.wav: no such audio file" in caplog.text
    with pytest.raises(ValueError, match=r"none of 1 recordings can be used; .*broken.wav"):
        fit_codec([tmp_path / "broken.wav"], tmp_path / "other")
    with pytest.raises(ValueError, match="none of 0 recordings can be used"):
        fit_codec([], tmp_path / "other")


def test_too_little_speech_and_wrong_codebooks_are_errors(tmp_path: Path, noise: Tensor) -> None:
    save_audio(tmp_path / "short.wav", noise[:8000], sample_rate=16000)
    with pytest.raises(ValueError, match=r"0.5 s of speech in all: a codec needs at least one sec"):
        fit_codec([tmp_path / "short.wav"], tmp_path / "codec")
    for sizes, message in (
        ([64, 64, 64], r"books=\[64, 64, 64\]: give 4 sizes"),
        ([9000, 64, 64, 64], r"at most \[8192, 8100, 8100, 8100\]"),
        ([64, 64, 64, 1], "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_codec([tmp_path / "short.wav"], tmp_path / "codec", codebook_sizes=sizes)
    with pytest.raises(ValueError, match=r"max_hours=0: must be more than 0"):
        fit_codec([tmp_path / "short.wav"], tmp_path / "codec", max_hours=0)
    with pytest.raises(ValueError, match=r"400 frames of speech allow at most 100 entries"):
        choose_codebook_sizes(400, (101, 2, 2, 2))
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        find_recordings([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no .wav, .mp3, .flac file"):
        find_recordings([tmp_path / "empty"])
    assert not (tmp_path / "codec").exists()


def test_wrong_waveforms_and_codes_are_errors(
    tmp_path: Path, noise: Tensor, noise_file: Path
) -> None:
    codec = fit_codec([noise_file], tmp_path / "codec")
    size = codec.codebook_sizes[1]
    codes = torch.zeros(3, 4, dtype=torch.long)
    for wrong, message in (
        (codes[:, :3], r"shape \(3, 3\)"),
        (codes.float(), r"torch.float32: expected integers \(N, 4\)"),
        (
            codes.index_fill(1, torch.tensor(1), size),
            rf"code {size} in frame 0, codebook 1 is outside",
        ),
        (
            codes - 1,
            r"code -1 in frame 0, codebook 0 is outside 0..\d+: take the 32 reserved ids away",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode(wrong)
    noise[5] = torch.nan
    for waveform, message in (
        (noise, "NaN"),
        (noise[:0], "empty"),
        (noise[None], r"shape \(1, 40000\)"),
        (noise.to(torch.int16), "expected floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.encode(waveform)


def test_damaged_folders_are_named(tmp_path: Path, noise_file: Path) -> None:
    folder = tmp_path / "codec"
    fit_codec([noise_file], folder)
    weights, config = folder / "codec.safetensors", folder / "codec.json"
    tensors, facts = load_file(weights), json.loads(config.read_text())

    def fails(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            MelCodec.load(folder)

    for changed, message in (
        (
            {"mean": tensors["mean"][1:].clone()},
            f"frames {FRAME_WIDTH} wide",
        ),
        ({"books.1": tensors["books.1"][:, 1:].clone()}, "do not make a codec"),
        ({"books.2": torch.full_like(tensors["books.2"], torch.nan)}, "NaN or infinite"),
        ({"more": torch.ones(1)}, r"holds \['basis', .*'more'\] instead of"),
    ):
        save_file(tensors | changed, weights)
        fails(message)
    weights.write_bytes(b"12345678")
    fails("codec.safetensors: not readable as safetensors")
    weights.unlink()
    fails("codec.safetensors: missing; fit the codec again", FileNotFoundError)
    config.write_text(json.dumps(facts | {"frames": "log_mel of old"}))
    fails("fitted over 'log_mel of old', while frames are now made as 'log_mel n_fft=640")
    config.write_text("{}")
    fails("format=None instead of 'vss_longcat_omni mel codec 1'")
    config.write_text("{")
    fails("codec.json: not readable as JSON")
    config.unlink()
    fails("codec.json: missing", FileNotFoundError)
