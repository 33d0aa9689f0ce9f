"""LongCat-Audio-Codec: recorded official results, lengths, splitting, look-ahead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tests.vss_longcat_omni.support.longcat_codec_samples import (
    TINY_DECODERS,
    load_tiny,
    read_record,
    write_checkpoints,
)
from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec, split_at_silences
from vss_longcat_omni.speech.longcat_codec.config import RELEASED_DECODERS, EncoderConfig
from vss_longcat_omni.speech.longcat_codec.decoder import LongCatDecoder
from vss_longcat_omni.speech.longcat_codec.encoder import LongCatEncoder
from vss_longcat_omni.speech.longcat_codec.semantic_encoder import FULL_SCALE

if TYPE_CHECKING:
    from pathlib import Path

SIZES = torch.tensor([40, 49, 49, 49])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ckpts")
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> LongCatAudioCodec:
    return load_tiny(folder)


def make_noise(num_samples: int) -> Tensor:
    """Noise of changing loudness, so that codes differ."""
    swell = torch.linspace(0, num_samples / 3000, num_samples).sin().abs()
    return 0.3 * swell * torch.randn(num_samples)


def make_codes(num_frames: int) -> Tensor:
    return (torch.rand(num_frames, 4) * SIZES).long()


# Recorded official results


def test_codes_are_the_official_ones(codec: LongCatAudioCodec) -> None:
    record = read_record()
    codes = codec.encode(record["waveform"].float())
    assert codes.dtype == torch.int64
    assert torch.equal(codes, record["codes"])


def test_what_the_codes_are_made_from_is_official(codec: LongCatAudioCodec) -> None:
    record = read_record()
    waveform = nn.functional.pad(record["waveform"].float(), (0, 5 * 960 - 4200))[None]
    tokenizer = codec.encoder.semantic_tokenizer
    features = tokenizer.feature_extractor(waveform * FULL_SCALE)
    states, vectors = tokenizer.model(features), codec.encoder.encoder(waveform)
    found = {"features": features, "states": states, "vectors": vectors}
    for name, value in found.items():
        wanted = record[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("decoder", TINY_DECODERS)
def test_speech_is_the_official_one(folder: Path, decoder: str) -> None:
    record = read_record()
    codec = load_tiny(folder, decoder)
    wanted = record[f"speech.{decoder}"]
    speech = codec.decode(record["codes"][:2])
    assert codec.sample_rate == TINY_DECODERS[decoder].sample_rate
    torch.testing.assert_close(speech, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_names_are_the_official_ones(codec: LongCatAudioCodec) -> None:
    features = "semantic_tokenizer.feature_extractor."
    named = {name for name in codec.encoder.state_dict() if not name.startswith(features)}
    assert named == set(read_record("encoder"))
    assert set(codec.encoder.state_dict()) - named == {
        features + name for name in ("cmvn.cmvn_mean", "cmvn.cmvn_scale")
    }
    assert set(codec.decoder.state_dict()) == set(read_record("24k"))


def test_released_sizes() -> None:
    """About 500M parameters in the transformer and 150M in a decoder, as the paper says."""
    with torch.device("meta"):
        encoder = LongCatEncoder(EncoderConfig())
        decoders = {name: LongCatDecoder(config) for name, config in RELEASED_DECODERS.items()}
    count = sum(p.numel() for p in encoder.semantic_tokenizer.model.encoder.parameters())
    assert count == 26 * (4 * 1280**2 + 4 * 1280 + 2 * 1280 * 5120 + 6400 + 3 * 2 * 1280)
    counts = {n: sum(p.numel() for p in d.parameters()) for n, d in decoders.items()}
    assert all(140e6 < count < 175e6 for count in counts.values()), counts
    shapes = {
        name: tuple(value.shape) for name, value in decoders["24k_4codebooks"].named_parameters()
    }
    assert shapes["decoder.mem_layers.0.lstm_list1.0.weight_ih_l0"] == (4 * 2304, 2304)
    assert shapes["decoder.model.0.weight_v"] == (1536, 2304, 7)
    assert shapes["semantic_dequantizer.dequant.weight"] == (8192, 1280)
    assert shapes["acoustic_quantizer.quantizers.2.codebook_b.weight"] == (90, 8)


# Lengths


@pytest.mark.parametrize("num_samples", [1, 399, 959, 960, 961, 1360, 1920, 9601])
def test_a_frame_is_60_ms_and_the_last_is_filled_up(
    codec: LongCatAudioCodec, num_samples: int
) -> None:
    waveform = make_noise(num_samples)
    num_frames = math.ceil(num_samples / 960)
    codes = codec.encode(waveform)
    assert codes.shape == (num_frames, 4)
    assert codec.num_frames(num_samples) == num_frames
    assert torch.equal(codes, codec.encode(nn.functional.pad(waveform, (0, -num_samples % 960))))
    assert codec.decode(codes).shape == (num_frames * 1440,)


def test_a_half_of_the_codec_does_its_half(folder: Path, codec: LongCatAudioCodec) -> None:
    codes = make_codes(4)
    waveform = make_noise(3000)
    encoder = LongCatAudioCodec(codec.encoder, None)
    decoder = LongCatAudioCodec(None, codec.decoder)
    assert torch.equal(encoder.encode(waveform), codec.encode(waveform))
    assert torch.equal(decoder.decode(codes), codec.decode(codes))
    with pytest.raises(ValueError, match="only encodes"):
        encoder.decode(codes)
    with pytest.raises(ValueError, match="only encodes"):
        _ = encoder.sample_rate
    with pytest.raises(ValueError, match="only decodes"):
        decoder.encode(waveform)


# Long speech


def test_long_speech_is_cut_where_it_is_silent(codec: LongCatAudioCodec) -> None:
    waveform = 0.1 * torch.randn(34 * 16_000 + 77)
    waveform[300 * 960 : 302 * 960] = 0
    pieces = split_at_silences(waveform)
    assert [len(piece) for piece in pieces] == [301 * 960, len(waveform) - 301 * 960]
    codes = codec.encode(waveform)
    assert codes.shape == (codec.num_frames(len(waveform)), 4)
    assert torch.equal(codes, torch.cat([codec.encode(piece) for piece in pieces]))


def test_each_cut_is_the_quietest_that_is_allowed() -> None:
    waveform = 0.1 * torch.randn(70 * 16_000 + 77)
    for frame in (100, 333, 720):  # the first comes too early to cut
        waveform[frame * 960 : (frame + 2) * 960] = 0
    pieces = split_at_silences(waveform)
    assert torch.equal(torch.cat(pieces), waveform)
    assert [len(piece) // 960 for piece in pieces[:2]] == [334, 721 - 334]
    assert len(pieces) == 3


@pytest.mark.parametrize("num_frames", [499, 500, 501, 626, 751, 1000, 1003, 2600])
def test_pieces_are_neither_too_long_nor_tiny(num_frames: int) -> None:
    waveform = torch.randn(num_frames * 960 - 7)
    sizes = [LongCatAudioCodec.num_frames(len(piece)) for piece in split_at_silences(waveform)]
    assert sum(sizes) == num_frames
    assert max(sizes) <= 500
    assert (len(sizes) == 1) == (num_frames <= 500)
    assert len(sizes) == 1 or min(sizes) >= 125


# Decoders


def changed_samples(codec: LongCatAudioCodec, *, num_frames: int, place: int) -> tuple[int, int]:
    """(first, last) sample of which any of several changes of one frame's codes takes hold."""
    hop = codec.sample_rate * 960 // 16_000
    first, last = num_frames * hop, 0
    for _ in range(4):
        codes = make_codes(num_frames)
        other = codes.clone()
        other[place] = (codes[place] + 1) % SIZES
        places = (codec.decode(codes) != codec.decode(other)).nonzero()
        first, last = min(first, int(places.min())), max(last, int(places.max()))
    return first, last


def test_the_24k_decoder_looks_three_frames_ahead(folder: Path) -> None:
    codec = load_tiny(folder, "24k")
    first, last = changed_samples(codec, num_frames=30, place=20)
    assert first // 1440 == 17
    assert first % 1440 == 0
    assert last >= 29 * 1440  # the LSTM remembers


def test_the_16k_decoder_looks_further(folder: Path) -> None:
    codec = load_tiny(folder, "16k")
    first, _ = changed_samples(codec, num_frames=30, place=20)
    assert first // 960 < 16


def test_a_beginning_is_decoded_as_in_the_whole(codec: LongCatAudioCodec) -> None:
    codes = make_codes(12)
    whole, begun = codec.decode(codes), codec.decode(codes[:8])
    torch.testing.assert_close(begun[: 5 * 1440], whole[: 5 * 1440], rtol=0, atol=1e-6)


def test_fewer_codebooks_are_decoded_too(codec: LongCatAudioCodec) -> None:
    codes = make_codes(3)
    speech = [codec.decode(codes[:, :columns]) for columns in (2, 3, 4)]
    assert all(len(one) == 3 * 1440 for one in speech)
    assert not torch.equal(speech[0], speech[2])
    longer = torch.cat((codes, codes[:, :1]), dim=1)  # a codebook that this decoder has not
    assert torch.equal(codec.decode(longer), speech[2])
    assert codec.decode(codes[:0]).shape == (0,)
