"""The filter bank: recorded official results, Kaldi's values, statistics, files and bad inputs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.vss_longcat_omni.support.audio_reference import (
    ALLOWED,
    compare_fbank,
    kaldi_tables,
    read_tensors,
)
from vss_longcat_omni.media.cmvn import Cmvn, read_kaldi_matrix, write_kaldi_matrix
from vss_longcat_omni.media.fbank import (
    Fbank,
    FbankConfig,
    add_deltas,
    compute_cmvn_stats,
    compute_frames,
    compute_log_mel,
    num_audio_tokens,
    save_fbank,
    splice,
)

CASES = Path(__file__).parents[2] / "reference" / "longcat_omni_fbank.cases.safetensors"


def noise(num_samples: int, *, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def released_json() -> dict[str, Any]:
    return json.loads(read_tensors(CASES)[1]["config"])["delta2"]


# Recorded official results.


def test_recorded_official_features_are_ours() -> None:
    errors = dict(compare_fbank(CASES))
    outputs = {n for n in read_tensors(CASES)[0] if not n.startswith("wave") and "stats" not in n}
    assert set(errors) == outputs
    assert max(errors.values()) <= ALLOWED, errors


@pytest.mark.parametrize(
    "name", ["plain.mel_banks", "delta2.delta.1", "plain.features.0", "plain.length_table"]
)
def test_one_changed_number_of_the_recording_is_found(tmp_path: Path, name: str) -> None:
    tensors, metadata = read_tensors(CASES)
    tensors[name][5, 1] += 1 if name.endswith("table") else 1e-2
    save_file(tensors, tmp_path / CASES.name, metadata)
    errors = dict(compare_fbank(tmp_path / CASES.name))
    assert {case for case, error in errors.items() if error > ALLOWED} == {name}


def test_a_recorded_tensor_that_nothing_compares_is_found(tmp_path: Path) -> None:
    tensors, metadata = read_tensors(CASES)
    save_file(tensors | {"plain.more": torch.ones(1)}, tmp_path / CASES.name, metadata)
    with pytest.raises(ValueError, match=r"nothing compares: \['plain.more'\]"):
        list(compare_fbank(tmp_path / CASES.name))


# Values known from elsewhere.


@pytest.mark.parametrize(
    ("rate", "low", "high", "bins"),
    [(16000, 20, -400, 80), (16000, 0, 8000, 40), (8000, 60, -1, 23)],
)
def test_log_mel_is_that_of_kaldi(rate: int, low: float, high: float, bins: int) -> None:
    config = FbankConfig(freq=rate, low_freq=low, high_freq=high, num_mel_bins=bins)
    waveform = noise(rate) + 0.3 * torch.sin(torch.arange(rate) * 0.2)
    kaldi = torchaudio.compliance.kaldi.fbank(
        32768 * waveform[None], sample_frequency=rate, low_freq=low, high_freq=high,
        num_mel_bins=bins, remove_dc_offset=False, dither=0.0,
    )  # fmt: skip
    torch.testing.assert_close(compute_log_mel(waveform, config), kaldi, rtol=0, atol=1e-3)


def test_silence_is_the_floor_and_eightfold_sound_is_log_64_more() -> None:
    """A power of two rounds nothing: with a tenth the difference depends on the processor."""
    floor = torch.tensor(torch.finfo(torch.float32).eps).log()
    assert (compute_frames(torch.zeros(800)) == floor).all()
    difference = compute_frames(noise(800)) - compute_frames(0.125 * noise(800))
    torch.testing.assert_close(difference, torch.full((3, 80), 64.0).log(), rtol=0, atol=1e-5)


def test_no_filter_is_empty() -> None:
    assert (kaldi_tables(FbankConfig())[1].sum(0) > 0).all()


def test_deltas_of_a_parabola_are_its_slope_and_that_of_the_slope() -> None:
    times = torch.arange(12.0)
    frames = torch.stack((times, times.square()), dim=1)
    deltas = add_deltas(frames, FbankConfig(delta_order=2))
    assert torch.equal(deltas[:, :2], frames)
    inner = slice(4, -4)  # the outer ones see the end frames repeated
    expected = torch.stack((times**0, 2 * times, 0 * times, 2 * times**0), dim=1)[inner]
    torch.testing.assert_close(deltas[inner, 2:], expected, rtol=0, atol=1e-4)
    ends = torchaudio.functional.compute_deltas(frames.T, win_length=5).T
    torch.testing.assert_close(deltas[:, 2:4], ends, rtol=0, atol=1e-4)


def test_a_token_is_its_frame_between_its_neighbors() -> None:
    frames = torch.arange(10.0)[:, None]
    tokens = splice(frames, FbankConfig(left=2, right=3, stride=4))
    assert tokens.tolist() == [[0, 0, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 9, 9]]


def test_zeros_pad_the_bins_of_a_narrow_band() -> None:
    config = FbankConfig(num_mel_bins=60, padded_num_mel_bins=80, delta_order=1)
    frames = compute_frames(noise(800), config)
    assert frames.shape == (3, 160)
    assert (frames.unflatten(1, (2, 80))[:, :, 60:] == 0).all()
    assert frames[:, :60].abs().min() > 0


def test_dither_is_noise_that_is_always_the_same() -> None:
    config = FbankConfig(dither=1.0)
    torch.manual_seed(1)
    first, drawn = compute_frames(torch.zeros(800), config), torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(first, compute_frames(torch.zeros(800), config))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # and takes nothing from other random numbers
    assert 0 < first.mean() < 10  # noise of one 16-bit step is far over the floor of -16


# Lengths.


def test_counted_tokens_are_the_features() -> None:
    fbank = Fbank(FbankConfig())
    for num_samples in (400, 559, 560, 1519, 1520, 1679, 1680, 16000, 23456):
        assert len(fbank(noise(num_samples))) == num_audio_tokens(num_samples)
    counts = [num_audio_tokens(n) for n in (0, 241, 399, 400, 1679, 1680, 16000, 160000, 480000)]
    assert counts == [0, 0, 0, 1, 1, 2, 13, 125, 375]
    assert fbank(noise(16000)).shape == (13, fbank.config.feature_dim) == (13, 1200)
    other = FbankConfig(frame_shift=20, stride=3)
    assert len(Fbank(other)(noise(16000))) == num_audio_tokens(16000, other) == 17


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(399), r"399 samples, under the 400 \(25 ms\) of one frame"),
        (torch.zeros(0), r"0 samples, under the 400"),
        (torch.zeros(2, 800), r"\(2, 800\) torch.float32 tensor is no waveform"),
        (torch.zeros(800, dtype=torch.int16), r"torch.int16 tensor is no waveform"),
        (torch.full((800,), torch.nan), "NaN or infinite"),
    ],
)
def test_what_has_no_features_is_an_error(waveform: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fbank()(waveform)


# Statistics.


def test_computed_statistics_normalize_their_clips() -> None:
    config = FbankConfig(delta_order=1)
    clips = [noise(8000), 0.01 * noise(30000, seed=1)]
    stats = compute_cmvn_stats(clips, config)
    assert stats[0, -1] == 48 + 186
    torch.testing.assert_close(stats, sum(compute_cmvn_stats([c], config) for c in clips))
    cmvn = Cmvn.from_stats(stats)
    frames = torch.cat([compute_frames(clip, config) for clip in clips])
    normed = (frames - cmvn.mean) * cmvn.scale
    torch.testing.assert_close(normed.mean(0), torch.zeros(160), rtol=0, atol=1e-3)
    torch.testing.assert_close(normed.std(0, correction=0), torch.ones(160), rtol=0, atol=1e-3)
    features = Fbank(config, cmvn)(clips[0])  # 7 neighbors before the first frame: itself
    torch.testing.assert_close(features[0, 7 * 160 : 8 * 160], normed[0])


def test_a_saved_folder_gives_the_same_features(tmp_path: Path) -> None:
    config = FbankConfig(left=3, right=2, high_freq=7000.5)
    stats = compute_cmvn_stats([noise(8000)], config)
    save_fbank(tmp_path / "audio", config, stats)
    loaded = Fbank.load(tmp_path / "audio")
    assert loaded.config == config
    assert torch.equal(loaded(noise(5000)), Fbank(config, Cmvn.from_stats(stats))(noise(5000)))


def test_kaldi_files_are_read_in_every_form(tmp_path: Path) -> None:
    matrix = torch.tensor([[1.5, -2.0, 1e9], [4.0, 5.25, 0.0]], dtype=torch.float64)
    path = tmp_path / "global_cmvn"
    path.write_text(" [\n  1.5 -2 1e+09 \n  4 5.25 0 ]\n")
    assert torch.equal(read_kaldi_matrix(path), matrix.float())
    floats = struct.pack("<6f", *matrix.flatten().tolist())
    path.write_bytes(b"\0BFM \4\2\0\0\0\4\3\0\0\0" + floats)
    assert torch.equal(read_kaldi_matrix(path), matrix.float())
    write_kaldi_matrix(path, matrix)
    assert torch.equal(read_kaldi_matrix(path), matrix)
    doubles = struct.pack("<6d", *matrix.flatten().tolist())
    assert path.read_bytes() == b"\0BDM \4\2\0\0\0\4\3\0\0\0" + doubles


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0BDM \4\2\0\0\0\4\3\0\0\0" + bytes(40), "2 x 3 numbers announced, 40 bytes"),
        (b"\0BDM", "header is cut off"),
        (b"\0BCM \4\2\0\0\0\4\3\0\0\0", "of type 'CM'"),
        (b"version https://git-lfs", r"neither binary nor text within \[ \]"),
        (b" [ 1 2\n 3 ]", "not readable as a Kaldi matrix"),
        (b"\xff\xfe", "not readable as a Kaldi matrix"),
        (b" [ 1 2 3 ]", r"a \(1, 3\) matrix instead of two rows"),
        (b" [ 1 2 0\n 3 4 0 ]", "value 0 of a frame has the variance"),
        (b" [ 1 2 1\n 9 1 0 ]", "value 1 of a frame has the variance -3 over 1 frames"),
        (b" [ 1 2 1\n 9 9 0 ]", "has 2 values a frame, .* makes 240"),
    ],
)
def test_unusable_statistics_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released_json()))
    (tmp_path / "global_cmvn").write_bytes(content)
    with pytest.raises(ValueError, match=f"global_cmvn.*{message}"):
        Fbank.load(tmp_path)


# The config.


def test_the_official_sections_are_read_and_written() -> None:
    values = released_json()
    config = FbankConfig.from_dict(values | {"processor_class": "other keys are ignored"})
    assert (config.feature_dim, config.delta_order, config.left) == (1200, 2, 2)
    written = config.to_dict()
    assert written.pop("cmvn") == {"global_cmvn": "global_cmvn"}
    assert written == {name: values[name] for name in ("fbank", "delta", "splice")}


def test_missing_keys_are_all_named() -> None:
    values = released_json()
    del values["fbank"]["low_freq"], values["splice"]
    names = "fbank.low_freq, splice.left, splice.right, splice.stride"
    with pytest.raises(ValueError, match=f"preprocessor_config.json: missing: {names}; add"):
        FbankConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freq": 44100}, "freq=44100 must be 16000 or 8000"),
        ({"high_freq": 0}, "high_freq=0 means 0 Hz: must be over low_freq and at most 8000"),
        ({"high_freq": 8001}, "high_freq=8001"),
        ({"preemphasis": 1.5}, "preemphasis=1.5 must be from 0 to 1"),
        ({"num_mel_bins": 3}, "num_mel_bins=3 must be 4 or more"),
        ({"dither": -1.0}, "dither=-1.0 must be 0 or more"),
        ({"stride": 0}, "stride=0 must be 1 or more"),
        ({"left": "7"}, "splice.left='7' must be of type int"),
        ({"random_start": 1}, "splice.random_start=1 must be of type bool"),
        ({"padded_num_mel_bins": 40}, "padded_num_mel_bins=40 is under num_mel_bins"),
    ],
)
def test_values_that_cannot_work_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {message}"):
        FbankConfig(**changes)


def test_a_random_start_is_reported_and_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    config = FbankConfig(random_start=True)
    assert "random_start=true is not followed" in caplog.text
    assert torch.equal(Fbank(config)(noise(5000)), Fbank()(noise(5000)))


def test_a_folder_without_a_usable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        Fbank.load(tmp_path)
    for content in ("[]", "{", '{"fbank": 3}'):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path.name}: preprocessor_config.json cannot"):
            Fbank.load(tmp_path)


# Speed.


class Work(TorchDispatchMode):
    """Counts torch's operations and the values that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.values += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def test_features_of_ten_seconds_are_fast() -> None:
    """About 4 ms on one core: no loop over the frames, and some 80 values a sample."""
    fbank = Fbank(FbankConfig(delta_order=2, left=2, right=2))
    with Work() as short:
        fbank(noise(16000))
    with Work() as long:
        fbank(noise(160000))
    assert long.operations <= short.operations < 200
    assert long.values < 200 * 160000


def test_mixed_precision_around_it_changes_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Fbank()(noise(5000))
    assert torch.equal(mixed, Fbank()(noise(5000)))
