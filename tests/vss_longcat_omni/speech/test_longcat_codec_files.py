"""Files of LongCat-Audio-Codec: what is read, and the messages of errors; bad inputs."""

from __future__ import annotations

import io
import logging
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.vss_longcat_omni.support.longcat_codec_samples import (
    CMVN_FILE,
    ENCODER_FILE,
    TINY_DECODERS,
    TINY_ENCODER,
    load_tiny,
    read_record,
    write_checkpoints,
)
from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec
from vss_longcat_omni.speech.longcat_codec.config import (
    RELEASED_DECODERS,
    DecoderConfig,
    EncoderConfig,
    SemanticConfig,
)
from vss_longcat_omni.speech.longcat_codec.decoder import LongCatDecoder
from vss_longcat_omni.speech.longcat_codec.loading import find_decoder_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoints(tmp_path)
    return tmp_path


def load_encoder(folder: Path, **changed: Any) -> LongCatAudioCodec:
    return LongCatAudioCodec.load(
        folder / ENCODER_FILE, None, encoder_config=TINY_ENCODER, **changed
    )


# What is read


def test_what_is_loaded_is_float32_frozen_and_in_evaluation_mode(folder: Path) -> None:
    codec = load_tiny(folder)
    for model in (codec.encoder, codec.decoder):
        assert not model.training
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32, name
            assert value.device.type == "cpu", name
        assert not any(parameter.requires_grad for parameter in model.parameters())
    recorded = read_record("24k")["semantic_dequantizer.dequant.weight"]
    loaded = codec.decoder.semantic_dequantizer.dequant.weight
    assert torch.equal(loaded, recorded.float())


def test_statistics_are_found_beside_the_checkpoint_or_given(folder: Path) -> None:
    waveform = read_record()["waveform"].float()
    codes = load_encoder(folder).encode(waveform)
    moved = folder / "elsewhere.npy"
    shutil.move(folder / CMVN_FILE, moved)
    assert torch.equal(load_encoder(folder, cmvn_file=moved).encode(waveform), codes)
    with pytest.raises(FileNotFoundError, match=CMVN_FILE):
        load_encoder(folder)


def test_statistics_in_the_checkpoint_come_first(folder: Path) -> None:
    codec = load_encoder(folder)
    mean = "semantic_tokenizer.feature_extractor.cmvn.cmvn_mean"
    codec.encoder.state_dict()[mean].fill_(7.0)
    torch.save(codec.encoder.state_dict(), folder / ENCODER_FILE)
    (folder / CMVN_FILE).unlink()
    assert (load_encoder(folder).encoder.state_dict()[mean] == 7).all()


def test_unknown_tensors_of_an_encoder_are_passed_over_as_officially(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = read_record("encoder") | {"semantic_tokenizer.gpu_feature.window": torch.ones(3)}
    torch.save(state, folder / ENCODER_FILE)
    with caplog.at_level(logging.INFO):
        load_encoder(folder)
    assert "semantic_tokenizer.gpu_feature.window" in caplog.text


@pytest.mark.parametrize("name", RELEASED_DECODERS)
def test_the_released_decoders_are_distinguished(name: str) -> None:
    with torch.device("meta"):
        state = LongCatDecoder(RELEASED_DECODERS[name]).state_dict()
    assert find_decoder_config(state) == RELEASED_DECODERS[name]


# Errors


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.target), "w")


def test_code_in_a_checkpoint_is_an_error_and_not_run(folder: Path) -> None:
    target = folder / "written"
    torch.save({"weight": torch.ones(1), "extra": Payload(target)}, folder / ENCODER_FILE)
    with pytest.raises(ValueError, match="not readable as a file of tensors"):
        load_encoder(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": {"weight": torch.ones(1)}}, "holds .'state_dict'. instead of named"),
        ([torch.ones(1)], "holds list instead of named tensors"),
        ({}, "tensors are missing"),
    ],
)
def test_other_layouts_are_named(folder: Path, content: Any, reason: str) -> None:
    torch.save(content, folder / "24k.pt")
    with pytest.raises(ValueError, match=reason) as caught:
        LongCatAudioCodec.load(None, folder / "24k.pt")
    assert "24k.pt" in str(caught.value)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="give an encoder checkpoint"):
        LongCatAudioCodec.load(None, None)
    with pytest.raises(FileNotFoundError, match=r"other\.pt.*meituan-longcat/LongCat-Audio-Codec"):
        LongCatAudioCodec.load(folder / "other.pt", None)
    whole = (folder / "24k.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        (folder / "24k.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"24k\.pt: not readable"):
            LongCatAudioCodec.load(None, folder / "24k.pt")


def test_checkpoints_of_another_shape_are_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit LongCatEncoder: .*instead of"):
        LongCatAudioCodec.load(folder / ENCODER_FILE, None)  # a tiny one for the released sizes
    with pytest.raises(
        ValueError, match=r"lstm_list1\.0\.weight_ih_l0 is \(64, 16\) instead of \(9216,"
    ):
        LongCatAudioCodec.load(None, folder / "24k.pt")
    with pytest.raises(ValueError, match=r"tensors are missing, such as encoder\.block\.0"):
        LongCatAudioCodec.load(folder / "24k.pt", None, encoder_config=TINY_ENCODER)
    with pytest.raises(ValueError, match="does not fit LongCatDecoder"):
        LongCatAudioCodec.load(None, folder / "16k.pt", decoder_config=TINY_DECODERS["24k"])
    torch.save(read_record("24k") | {"more": torch.ones(1)}, folder / "24k.pt")
    with pytest.raises(
        ValueError, match=r"1 tensors are not of a LongCat-Audio-Codec decoder.*more"
    ):
        load_tiny(folder)


def pickled(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickled(np.ones((2, 81))), r"shape \(2, 81\) instead of \(2, 9\)"),
        (pickled(np.zeros((2, 9))), "count no frame"),
        (pickled(np.full((2, 9), np.nan)), "hold NaN"),
        (pickled(np.array([{"a": 1}], dtype=object)), "not readable"),
        (b"", "not readable"),
    ],
)
def test_bad_statistics_are_errors(folder: Path, content: bytes, reason: str) -> None:
    (folder / CMVN_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_encoder(folder)
    assert CMVN_FILE in str(caught.value)


def test_impossible_configs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"rates=\(4, 5\): their product is to be 960"):
        EncoderConfig(rates=(4, 5))
    with pytest.raises(ValueError, match="nhead=3"):
        EncoderConfig(semantic=SemanticConfig(nhead=3))
    with pytest.raises(ValueError, match="product is to be 1440"):
        DecoderConfig(rates=(8, 6, 5, 4))
    with pytest.raises(ValueError, match="sample_rate=22050"):
        DecoderConfig(sample_rate=22_050)


# Bad inputs


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [
        (torch.zeros(0), "is empty, or holds NaN"),
        (torch.zeros(100, dtype=torch.int16), r"torch\.int16: expected floating point"),
        (torch.zeros(1, 100), r"shape \(1, 100\)"),
        (torch.full((100,), torch.nan), "is empty, or holds NaN"),
    ],
)
def test_bad_waveforms_are_errors(folder: Path, waveform: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_encoder(folder).encode(waveform)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (torch.zeros(3, 4), r"expected integers \(N, 4\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"shape \(3, 1\)"),
        (torch.zeros(1, 3, 4, dtype=torch.long), r"shape \(1, 3, 4\)"),
        (torch.tensor([[0, 0, 0, 0], [40, 0, 0, 0]]), r"code 40 in frame 1, codebook 0 .* 0\.\.39"),
        (torch.tensor([[39, 0, 0, 49]]), r"code 49 in frame 0, codebook 3 .* 0\.\.48"),
        (torch.tensor([[0, -1, 0, 0]]), "code -1 in frame 0, codebook 1"),
    ],
)
def test_bad_codes_are_errors(folder: Path, codes: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_tiny(folder).decode(codes)
