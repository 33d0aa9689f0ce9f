"""`open_codec`: each kind of folder gives a `SpeechCodec`, all else an error of what it lacks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.vss_longcat_omni.support.longcat_codec_samples import (
    CMVN_FILE,
    ENCODER_FILE,
    TINY_DECODERS,
    TINY_ENCODER,
    write_checkpoints,
)
from vss_longcat_omni.media.audio import save_audio
from vss_longcat_omni.speech.codec import DECODER_NAMES, SpeechCodec, find_checkpoints, open_codec
from vss_longcat_omni.speech.fit_codec import fit_codec
from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DECODER_24K, DECODER_16K = DECODER_NAMES[1:3]


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny LongCat-Audio-Codec under the released names, which are then read as tiny ones."""
    folder = tmp_path / "released"
    folder.mkdir()
    write_checkpoints(folder)
    (folder / "24k.pt").rename(folder / DECODER_24K)
    (folder / "16k.pt").rename(folder / DECODER_16K)
    load = LongCatAudioCodec.load

    def load_as_tiny(encoder: Path | None, decoder: Path | None, **options: Any) -> Any:
        kind = "16k" if decoder is not None and "16k" in decoder.name else "24k"
        return load(
            encoder,
            decoder,
            encoder_config=TINY_ENCODER,
            decoder_config=TINY_DECODERS[kind],
            **options,
        )

    monkeypatch.setattr(LongCatAudioCodec, "load", load_as_tiny)
    return folder


def check_contract(codec: SpeechCodec, waveform: Tensor) -> None:
    assert codec.name
    codes = codec.encode(waveform)
    assert codes.shape == (-(-len(waveform) // 960), 4)
    assert codes.dtype == torch.int64
    assert (codes >= 0).all()
    assert (codes < torch.tensor(codec.codebook_sizes)).all()
    speech = codec.decode(codes)
    assert speech.shape == (len(codes) * codec.sample_rate * 60 // 1000,)
    assert speech.dtype == torch.float32
    with pytest.raises(ValueError, match="in frame 0, codebook 2 is outside"):
        codec.decode(codes.index_fill(1, torch.tensor(2), 8100))


def test_fitted_codec_opens(tmp_path: Path, noise: Tensor) -> None:
    save_audio(tmp_path / "noise.wav", noise, sample_rate=16000)
    fitted = fit_codec([tmp_path / "noise.wav"], tmp_path / "codec")
    codec = open_codec(str(tmp_path / "codec"))
    check_contract(codec, noise)
    assert (codec.name, codec.sample_rate) == ("mel", 16000)
    assert codec.codebook_sizes == fitted.codebook_sizes
    assert codec.fingerprint == fitted.fingerprint
    (tmp_path / "codec" / "codec.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"codec.json: missing; fit the codec again"):
        open_codec(str(tmp_path / "codec"))


@pytest.mark.parametrize("place", [".", "ckpts", "audio_codec"])
def test_longcat_audio_codec_opens(
    checkpoints: Path, tmp_path: Path, noise: Tensor, place: str
) -> None:
    folder = tmp_path / "model"
    (folder / place).parent.mkdir(exist_ok=True)
    checkpoints.rename(folder / place)
    codec = open_codec(str(folder))
    check_contract(codec, noise)
    assert (codec.name, codec.sample_rate) == ("longcat", 24000)
    assert codec.codebook_sizes == (8192, 8100, 8100, 8100)


def test_the_best_decoder_is_taken_and_reported(
    checkpoints: Path, noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        best = open_codec(str(checkpoints))
    assert best.sample_rate == 24000
    assert f"2 decoders; taking {DECODER_24K}" in caplog.text
    (checkpoints / DECODER_24K).unlink()
    other = open_codec(str(checkpoints))
    assert other.sample_rate == 16000
    assert other.fingerprint == best.fingerprint  # codes are the encoder's
    assert torch.equal(other.encode(noise), best.encode(noise))


def test_either_half_is_enough_for_its_part(checkpoints: Path, noise: Tensor) -> None:
    whole = open_codec(str(checkpoints))
    codes = whole.encode(noise)
    encoder_file = (checkpoints / ENCODER_FILE).rename(checkpoints / "aside.pt")
    decoder = open_codec(str(checkpoints))
    assert torch.equal(decoder.decode(codes), whole.decode(codes))
    assert decoder.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="without an encoder"):
        decoder.encode(noise)
    encoder_file.rename(checkpoints / ENCODER_FILE)
    for name in (DECODER_16K, DECODER_24K):
        (checkpoints / name).unlink()
    encoder = open_codec(str(checkpoints))
    assert torch.equal(encoder.encode(noise), codes)
    assert encoder.fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="without a decoder"):
        encoder.decode(codes)
    assert find_checkpoints(checkpoints) == (checkpoints / ENCODER_FILE, None)


def test_the_fingerprint_is_of_what_decides_the_codes(checkpoints: Path) -> None:
    before = open_codec(str(checkpoints)).fingerprint
    statistics = checkpoints / CMVN_FILE
    content = bytearray(statistics.read_bytes())
    content[-1] ^= 1
    statistics.write_bytes(content)
    assert open_codec(str(checkpoints)).fingerprint != before


def test_what_is_no_codec_gets_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"codec=.*absent: no such folder. Fit one to your"):
        open_codec(str(tmp_path / "absent"))
    (tmp_path / "other.txt").write_text("")
    for place in (tmp_path, tmp_path / "other.txt"):
        with pytest.raises(ValueError, match=r"not a folder of a codec. It is to hold codec.safe"):
            open_codec(str(place))
    (tmp_path / ENCODER_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{ENCODER_FILE}: not readable as a file of tensors"):
        open_codec(str(tmp_path))
