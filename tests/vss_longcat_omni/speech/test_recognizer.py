"""Recognizers transcribe: the real programs, with what can be had offline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from tests.llama_omni.speech.test_recognizer import make_whisper
from vss_longcat_omni.media.audio import resample
from vss_longcat_omni.speech import closed_recognizer, recognizer
from vss_longcat_omni.speech.closed_recognizer import load_closed_recognizer
from vss_longcat_omni.speech.recognizer import load_recognizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def say(text: str) -> Tensor:
    """By espeak-ng, at 16 kHz."""
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    from data.espeak import SAMPLE_RATE, synthesize

    spoken = synthesize(text, voice="en-us+m3", speed=160, pitch=50)
    return resample(torch.from_numpy(spoken / 32768).float(), SAMPLE_RATE, 16000)


def test_pocketsphinx_transcribes_real_speech() -> None:
    waveform = say("One two three four five.")
    recognizer = load_recognizer("pocketsphinx")
    assert recognizer is not None
    assert recognizer.name == "pocketsphinx en-us"
    found = recognizer.transcribe(waveform)
    assert found == "one two three four five"
    assert recognizer.transcribe(torch.zeros(0)) == ""
    recognizer.transcribe(torch.randn(16000, generator=torch.Generator().manual_seed(0)))
    assert recognizer.transcribe(waveform) == found  # whatever it transcribed in between


def test_a_closed_recognizer_returns_one_of_its_sentences() -> None:
    waveform = say("It is a red circle.")
    listen = load_closed_recognizer(["it is a blue square", "it is a red circle", "it moves up"])
    assert listen(waveform) == "it is a red circle"
    assert listen(torch.zeros(100)) == ""
    assert load_closed_recognizer(["five", "it moves up"])(waveform) != "it is a red circle"


def test_whisper_transcribes_what_it_was_trained_on(tmp_path: Path) -> None:
    time = torch.arange(16000) / 16000
    clips = {
        "low": 0.3 * torch.sin(2 * math.pi * 220 * time),
        "top": 0.3 * torch.sin(2 * math.pi * 3000 * time),
    }
    make_whisper(tmp_path / "whisper", clips)
    recognizer = load_recognizer(f"whisper:{tmp_path / 'whisper'}")
    assert recognizer is not None
    assert recognizer.name == f"whisper:{tmp_path / 'whisper'}"
    assert [recognizer.transcribe(clip) for clip in clips.values()] == list(clips)
    assert isinstance(recognizer.transcribe(clips["low"].repeat(33)), str)  # by pieces of 30 s


def test_what_cannot_be_had_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no whole Whisper there"):
        load_recognizer(f"whisper:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        load_recognizer(f"whisper:{tmp_path / 'absent'}")
    for spec in ("siri", "whisper:", "whisper"):
        with pytest.raises(ValueError, match=f"--asr {spec}: give whisper:FOLDER_OR_HUB_ID"):
            load_recognizer(spec)
    assert load_recognizer("none") is None
    monkeypatch.setattr(recognizer, "is_installed", lambda package: False)
    assert load_recognizer("auto") is None
    with pytest.raises(ValueError, match="pocketsphinx: not installed; install the extra 'eval'"):
        load_recognizer("pocketsphinx")
    monkeypatch.setattr(closed_recognizer, "is_installed", lambda package: False)
    with pytest.raises(ValueError, match="not installed; install the extra 'eval'"):
        load_closed_recognizer(["five"])
