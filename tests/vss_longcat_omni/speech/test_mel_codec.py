"""The embedded codec: what it says is understood, fits repeat, and bad inputs are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from vss_longcat_omni.media.audio import load_audio, resample, save_audio
from vss_longcat_omni.speech import log_mel
from vss_longcat_omni.speech.embedded_codec import MelCodec, assign, compute_frames
from vss_longcat_omni.speech.fit_codec import choose_codebook_sizes, fit_codec, fit_kmeans
from vss_longcat_omni.tools.fit_codec import find_recordings, main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The answers of `data/make_vss.py`, each with its recording."""
    pytest.importorskip("espeakng_loader")
    from data.espeak import SAMPLE_RATE, synthesize
    from data.make_vss import ANSWER_SPEED, ANSWER_VOICE, list_answers

    folder = tmp_path_factory.mktemp("speech")
    paths = {}
    for number, text in enumerate(list_answers()):
        spoken = synthesize(text, voice=ANSWER_VOICE, speed=ANSWER_SPEED, pitch=50)
        waveform = resample(torch.from_numpy(spoken / 32768).float(), SAMPLE_RATE, 16000)
        paths[text] = folder / f"{number:02d}" / "output.wav"
        save_audio(paths[text], waveform, sample_rate=16000)
    return paths


@pytest.fixture(scope="module")
def codec(clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> MelCodec:
    folder = tmp_path_factory.mktemp("codec") / "fitted"
    fit_codec(list(clips.values()), folder)
    return MelCodec.load(folder)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def noise_file(tmp_path: Path, noise: Tensor) -> Path:
    path = tmp_path / "noise.wav"
    save_audio(path, noise, sample_rate=16000)
    return path


def load_grammar(sentences: list[str]) -> Callable[[Tensor], str]:
    """PocketSphinx, which recognizes one of these sentences."""
    decoder = pytest.importorskip("pocketsphinx").Decoder(samprate=16000, loglevel="FATAL", lm=None)
    decoder.add_jsgf_string(
        "answers", f"#JSGF V1.0; grammar a; public <a> = {' | '.join(sentences)};"
    )
    decoder.activate_search("answers")

    def transcribe(waveform: Tensor) -> str:
        decoder.reinit_feat()  # else it adapts to what it was given before
        decoder.start_utt()
        pcm = (waveform * 32767).to(torch.int16).numpy().tobytes()
        decoder.process_raw(pcm, no_search=False, full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else found.hypstr

    return transcribe


# What it does


def test_speech_is_understood_through_four_codes_a_frame(
    clips: dict[str, Path], codec: MelCodec
) -> None:
    transcribe = load_grammar(list(clips))
    through = {text: codec.decode(codec.encode(load_audio(path))) for text, path in clips.items()}
    found = {text: transcribe(waveform) for text, waveform in through.items()}
    assert sum(text == other for text, other in found.items()) >= len(clips) - 1
    # The evaluator can fail: backwards nothing is understood.
    found = {text: transcribe(waveform.flip(0)) for text, waveform in through.items()}
    assert sum(text == other for text, other in found.items()) < len(clips) / 2


@pytest.mark.parametrize("num_samples", [1, 959, 960, 961, 5000])
def test_a_frame_is_960_samples_and_the_last_is_filled_up(
    codec: MelCodec, noise: Tensor, num_samples: int
) -> None:
    codes = codec.encode(noise[:num_samples])
    num_frames = -(-num_samples // 960)
    assert codes.shape == (num_frames, 4)
    assert codes.dtype == torch.int64
    waveform = codec.decode(codes)
    assert waveform.shape == (960 * num_frames,)
    assert waveform.dtype == torch.float32
    assert float(waveform.abs().max()) <= 1
    padded = torch.cat([noise[:num_samples], torch.zeros(960 * num_frames - num_samples)])
    assert torch.equal(codec.encode(padded), codes)


def test_the_same_codes_give_the_same_samples(codec: MelCodec, noise: Tensor) -> None:
    codes = codec.encode(noise)
    torch.manual_seed(1)
    first = codec.decode(codes)
    torch.manual_seed(2)
    assert torch.equal(codec.decode(codes.int()), first)
    assert codec.decode(codes[:0]).shape == (0,)


def test_each_codebook_adds_detail(clips: dict[str, Path], codec: MelCodec) -> None:
    frames = torch.cat([compute_frames(load_audio(path)) for path in clips.values()])
    codes = torch.cat([codec.encode(load_audio(path)) for path in clips.values()])
    known, errors = codec.mean.expand_as(frames), []
    for column, codebook in enumerate(codec.codebooks):
        known = known + codebook[codes[:, column]] @ codec.basis.T
        errors.append(float((frames - known).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 5


def test_a_tone_keeps_its_pitch_level_and_place_in_time() -> None:
    time = torch.arange(16_000) / 16_000
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)
    tone[8000:] = 0
    mel = log_mel.compute_log_mel(tone)
    assert mel.shape == (100, 80)
    waveform = log_mel.griffin_lim(log_mel.invert_log_mel(mel))
    assert waveform.shape == tone.shape
    loud, quiet = waveform[1000:7000], waveform[9000:]
    peak = int(torch.fft.rfft(loud).abs().argmax()) * 16_000 / len(loud)
    assert abs(peak - 440) < 15
    assert 0.7 < float(loud.std() / tone[1000:7000].std()) < 1.4
    assert float(quiet.std()) < 0.01
    again = log_mel.compute_log_mel(waveform)
    steps = torch.stack([again.exp().sum(1), mel.exp().sum(1)]) > 0.5 * mel.exp().sum(1).max()
    assert int((steps[0] != steps[1]).sum()) <= 1  # frames of 10 ms


# Fitting


def test_fits_repeat_and_a_repeated_recording_counts_once(
    tmp_path: Path, clips: dict[str, Path], codec: MelCodec
) -> None:
    paths = list(clips.values())
    again = fit_codec([*paths, *paths], tmp_path / "again")
    assert again.codebook_sizes == codec.codebook_sizes
    few = [fit_codec(paths[:6], tmp_path / f"few{seed}", seed=seed) for seed in (0, 1)]
    same = fit_codec(paths[:6], tmp_path / "same", seed=0)
    assert same.fingerprint == few[0].fingerprint
    assert len({codec.fingerprint, few[0].fingerprint, few[1].fingerprint}) == 3


def test_written_codec_is_the_fitted_one(tmp_path: Path, noise: Tensor, noise_file: Path) -> None:
    fitted = fit_codec([noise_file], tmp_path / "a" / "codec", codebook_sizes=[8, 4, 2, 2])
    loaded = MelCodec.load(tmp_path / "a" / "codec")
    assert loaded.codebook_sizes == fitted.codebook_sizes == (8, 4, 2, 2)
    assert loaded.fingerprint == fitted.fingerprint
    codes = fitted.encode(noise)
    assert torch.equal(loaded.encode(noise), codes)
    assert torch.equal(loaded.decode(codes), fitted.decode(codes))
    config = json.loads((tmp_path / "a" / "codec" / "codec.json").read_text())
    assert config["fitted_to_frames"] == 42
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["codec"]


def test_a_killed_fit_leaves_no_codec(
    tmp_path: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "vss_longcat_omni.speech.embedded_codec.json.dumps", fail
        )  # between the two files
        with pytest.raises(KeyboardInterrupt):
            fit_codec([noise_file], tmp_path / "codec")
    assert not (tmp_path / "codec").exists()
    assert (tmp_path / f"codec.{os.getpid()}.partial" / "codec.safetensors").exists()
    fit_codec([noise_file], tmp_path / "codec")
    assert [path.name for path in tmp_path.glob("codec*")] == ["codec"]
    with pytest.raises(ValueError, match="codec: exists already; delete it"):
        fit_codec([noise_file], tmp_path / "codec")


def test_codebook_sizes_follow_the_amount_of_speech() -> None:
    assert choose_codebook_sizes(17, None) == (4, 4, 4, 4)
    assert choose_codebook_sizes(307, None) == (70, 70, 70, 70)
    assert choose_codebook_sizes(14_400, None) == (480, 480, 480, 480)
    assert choose_codebook_sizes(10_000_000, None) == (8192, 8100, 8100, 8100)
    assert choose_codebook_sizes(400, (100, 50, 20, 2)) == (100, 50, 20, 2)


def test_kmeans_finds_the_groups_and_leaves_no_centroid_without_points() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(6, 5, generator=generator) * 10
    # Nearly all points are of the first group, as of silence.
    numbers = torch.cat([torch.zeros(500, dtype=torch.long), torch.arange(6).repeat(8)])
    points = groups[numbers] + 0.1 * torch.randn(len(numbers), 5, generator=generator)
    centroids = fit_kmeans(points, 12, seed=0)
    assert centroids.dtype == torch.float32
    ids = assign(points, centroids)
    assert torch.equal(ids, torch.cdist(points, centroids).argmin(1))
    assert float((points - centroids[ids]).norm(dim=1).max()) < 1
    assert len(ids.unique()) == 12
    assert torch.equal(fit_kmeans(points, 12, seed=0), centroids)
    assert not torch.equal(fit_kmeans(points, 12, seed=1), centroids)
    with pytest.raises(ValueError, match="548 points cannot make 549 centroids"):
        fit_kmeans(points, 549)


def test_without_scikit_learn_the_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match=r"pip install scikit-learn`, or name a codec .*--codec"):
        fit_kmeans(torch.zeros(4, 2), 2)


# Commands


def test_commands_fit_and_speak(
    tmp_path: Path, clips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = next(iter(clips.values())).parents[1]
    save_audio(folder / "00" / "input.wav", torch.ones(800), sample_rate=16000)
    answers = find_recordings([folder])
    assert answers == sorted(clips.values())  # no questions
    out = tmp_path / "codec"
    assert main(["fit", str(folder), "--out", str(out), "--books", "30", "20", "10", "5"]) == 0
    assert "codebooks of 30, 20, 10, 5" in capsys.readouterr().out
    spoken = tmp_path / "spoken.wav"
    assert main(["round-trip", str(answers[0]), str(spoken), "--codec", str(out)]) == 0
    length = len(load_audio(answers[0]))
    assert 0 <= len(load_audio(spoken)) - length < 960
    assert main(["fit", str(folder), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "vss_longcat_omni.tools.fit_codec", "fit", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "DIR_OR_WAV" in shown


def test_hours_beyond_the_limit_are_not_read(
    tmp_path: Path, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.wav" for number in range(5)]
    for number, path in enumerate(paths):
        save_audio(path, noise.roll(number), sample_rate=16000)
    read: list[Path] = []
    monkeypatch.setattr(
        "vss_longcat_omni.speech.fit_codec.load_audio",
        lambda path: read.append(path) or load_audio(path),
    )
    fit_codec(paths, tmp_path / "codec", max_hours=6 / 3600)  # a clip lasts 2.5 s
    assert len(read) == 3
