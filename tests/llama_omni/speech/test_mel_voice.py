"""Tests the embedded voice: it speaks the given units, and streaming changes no sample."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from llama_omni.speech.audio import resample
from llama_omni.speech.kmeans import KMeans, fit_kmeans, mean_run_lengths, save_kmeans
from llama_omni.speech.log_mel import HOP, compute_log_mel
from llama_omni.speech.mel_voice import MelVoice
from llama_omni.speech.vocoder import load_voice
from tests.llama_omni.speech.test_vocoder import cut

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def units() -> list[int]:
    return torch.randint(60, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def speech() -> list[Tensor]:
    """Real sentences at 16 kHz; the last is held out where something is fitted."""
    pytest.importorskip("espeakng_loader")
    from data.espeak import SAMPLE_RATE, synthesize

    texts = [
        "The opposite of hot is cold.",
        "Seven plus nine is sixteen.",
        "The capital of France is Paris.",
        "The color of snow is white.",
        "Three plus eight is eleven, and two plus five is seven.",
        "The opposite of night is day.",
        "Nine plus five is fourteen.",
    ]
    spoken = [synthesize(text, voice="en-us", speed=160, pitch=50) for text in texts]
    return [resample(torch.from_numpy(s / 32768.0).float(), SAMPLE_RATE, 16000) for s in spoken]


@pytest.fixture(scope="module")
def fitted(speech: list[Tensor]) -> KMeans:
    clips = [compute_log_mel(waveform) for waveform in speech[:-1]]
    kmeans = KMeans("log_mel", fit_kmeans(torch.cat(clips), 60))
    return replace(kmeans, durations=mean_run_lengths([kmeans.assign(c) for c in clips], 60))


def test_mel_voice_says_what_was_said(speech: list[Tensor], fitted: KMeans) -> None:
    """Mel frames of the voice correlate with those of the sentence, run of units by run."""
    original = compute_log_mel(speech[-1])
    ids = fitted.assign(original)
    spoken_units, lengths = torch.unique_consecutive(ids, return_counts=True)
    assert fitted.durations is not None
    voice = MelVoice(fitted)
    waveform = voice(spoken_units.tolist())
    spoken = compute_log_mel(waveform)
    ends = (fitted.durations[spoken_units].double().cumsum(0) + 0.5).floor().long().tolist()
    assert len(waveform) == ends[-1] * HOP
    assert abs(len(waveform) / len(speech[-1]) - 1) < 0.25  # the tempo is kept
    decoded = torch.stack([spoken[a:b].mean(0) for a, b in pairwise([0, *ends])])
    meant = torch.stack([run.mean(0) for run in original.split(lengths.tolist())])

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([(x - x.mean(0)).flatten() for x in (a, b)]))[0, 1])

    by_chance = correlation(decoded[torch.randperm(len(decoded))], meant)
    assert correlation(decoded, meant) > 0.8
    assert abs(by_chance) < 0.3


@pytest.mark.parametrize("sizes", [[1], [2], [5], [17], [1000], [0, 3, 0, 1]])
def test_mel_voice_streams_exactly(fitted: KMeans, units: list[int], sizes: list[int]) -> None:
    voice = MelVoice(fitted)
    whole = voice(units)
    assert torch.equal(voice(units), whole)
    pieces = list(voice.stream(cut(units, sizes)))
    assert torch.equal(torch.cat(pieces), whole)
    assert float(whole.abs().max()) > 0.05
    if len(pieces) > 10:
        assert sum(len(piece) > 0 for piece in pieces) > len(pieces) // 3


def test_mel_voice_of_few_units(fitted: KMeans) -> None:
    voice = MelVoice(fitted)
    assert voice([]).shape == (0,)
    assert len(voice([3])) == int(voice.durations[3] + 0.5) * HOP
    with pytest.raises(ValueError, match=r"unit 60 is outside the voice's 0..59"):
        voice([60])
    with pytest.raises(ValueError, match=r"unit -1 is outside"):
        list(voice.stream([[-1]]))


def test_load_mel_voice(tmp_path: Path, fitted: KMeans, units: list[int]) -> None:
    path = tmp_path / "k.safetensors"
    save_kmeans(path, fitted)
    voice = load_voice(vocoder_path=None, kmeans_path=path)
    assert (voice.sample_rate, voice.num_units) == (16000, 60)
    assert torch.equal(voice(units), MelVoice(fitted)(units))
