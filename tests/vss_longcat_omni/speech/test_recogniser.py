"""Recognisers hear: the real programs, with what can be had offline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from tests.llama_omni.speech.test_judges import make_whisper
from vss_longcat_omni.media.audio import resample
from vss_longcat_omni.speech import recognizer
from vss_longcat_omni.speech.recognizer import load_listener, load_recogniser

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def say(text: str) -> Tensor:
    """By espeak-ng, at 16 kHz."""
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    from data.espeak import SAMPLE_RATE, synthesise

    spoken = synthesise(text, voice="en-us+m3", speed=160, pitch=50)
    return resample(torch.from_numpy(spoken / 32768).float(), SAMPLE_RATE, 16000)


def test_pocketsphinx_hears_real_speech() -> None:
    waveform = say("One two three four five.")
    recogniser = load_recogniser("pocketsphinx")
    assert recogniser is not None
    assert recogniser.name == "pocketsphinx en-us"
    heard = recogniser.hear(waveform)
    assert heard == "one two three four five"
    assert recogniser.hear(torch.zeros(0)) == ""
    recogniser.hear(torch.randn(16000, generator=torch.Generator().manual_seed(0)))
    assert recogniser.hear(waveform) == heard  # whatever it heard in between


def test_a_listener_hears_one_of_its_sentences() -> None:
    waveform = say("It is a red circle.")
    listen = load_listener(["it is a blue square", "it is a red circle", "it moves up"])
    assert listen(waveform) == "it is a red circle"
    assert listen(torch.zeros(100)) == ""
    assert load_listener(["five", "it moves up"])(waveform) != "it is a red circle"


def test_whisper_hears_what_it_was_trained_on(tmp_path: Path) -> None:
    time = torch.arange(16000) / 16000
    clips = {
        "low": 0.3 * torch.sin(2 * math.pi * 220 * time),
        "top": 0.3 * torch.sin(2 * math.pi * 3000 * time),
    }
    make_whisper(tmp_path / "whisper", clips)
    recogniser = load_recogniser(f"whisper:{tmp_path / 'whisper'}")
    assert recogniser is not None
    assert recogniser.name == f"whisper:{tmp_path / 'whisper'}"
    assert [recogniser.hear(clip) for clip in clips.values()] == list(clips)
    assert isinstance(recogniser.hear(clips["low"].repeat(33)), str)  # by pieces of 30 s


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no whole Whisper there"):
        load_recogniser(f"whisper:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        load_recogniser(f"whisper:{tmp_path / 'absent'}")
    for spec in ("siri", "whisper:", "whisper"):
        with pytest.raises(ValueError, match=f"--asr {spec}: give whisper:FOLDER_OR_HUB_ID"):
            load_recogniser(spec)
    assert load_recogniser("none") is None
    monkeypatch.setattr(recognizer, "is_installed", lambda package: False)
    assert load_recogniser("auto") is None
    with pytest.raises(ValueError, match="pocketsphinx: not installed; install the extra 'eval'"):
        load_recogniser("pocketsphinx")
    with pytest.raises(ValueError, match="not installed; install the extra 'eval'"):
        load_listener(["five"])
