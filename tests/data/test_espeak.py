"""data/espeak.py: audible speech that depends on its arguments alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="the extra `data` is not installed")

from data import espeak
from data.make_speech import ANSWER_VOICE, QUESTION_VOICES

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"
SAY = """
import sys
from data import espeak
for text in ("Fifty-five.", "What color is the sky?"):
    espeak.synthesize(text, voice="en-gb", speed=150, pitch=40)
for voice in sys.argv[2:]:
    samples = espeak.synthesize(sys.argv[1], voice=voice, speed=160, pitch=50)
    sys.stdout.buffer.write(samples.tobytes())
"""


@pytest.mark.parametrize("voice", [*QUESTION_VOICES, ANSWER_VOICE])
def test_every_voice_speaks(voice: str) -> None:
    samples = espeak.synthesize(QUESTION, voice=voice, speed=160, pitch=50)
    assert samples.dtype == np.int16
    assert 1.0 < len(samples) / espeak.SAMPLE_RATE < 3.0
    loudness = np.sqrt(np.mean((samples / 32768.0) ** 2))
    assert 0.03 < loudness < 0.3
    assert not samples[: espeak.SAMPLE_RATE // 25].any()  # begins and ends in silence
    assert not samples[-espeak.SAMPLE_RATE // 25 :].any()


def test_voice_speed_and_pitch_are_heard() -> None:
    spoken = {
        voice: espeak.synthesize(QUESTION, voice=voice, speed=160, pitch=50).tobytes()
        for voice in [*QUESTION_VOICES, ANSWER_VOICE]
    }
    assert len(set(spoken.values())) == len(spoken)

    def fundamental(pitch: int) -> float:
        """Hz of the strongest repetition between 60 and 250 Hz in the middle of a vowel."""
        samples = espeak.synthesize("moo", voice="en-gb", speed=80, pitch=pitch)
        start = len(samples) // 2 - 1024
        vowel = samples[start : start + 2048].astype(float)
        repetition = np.correlate(vowel, vowel, "full")[2047:] / np.arange(2048, 0, -1)
        low, high = espeak.SAMPLE_RATE // 250, espeak.SAMPLE_RATE // 60
        return espeak.SAMPLE_RATE / (low + int(np.argmax(repetition[low:high])))

    assert fundamental(80) > 1.5 * fundamental(20)
    slow = espeak.synthesize(QUESTION, voice="en-gb", speed=120, pitch=50)
    fast = espeak.synthesize(QUESTION, voice="en-gb", speed=200, pitch=50)
    assert len(slow) > 1.3 * len(fast)


def test_speech_does_not_depend_on_what_was_said_before_or_when() -> None:
    # en-us: flutter; +f3 and +f5: breath, seeded by the time of day; +caleb: libc's rand().
    voices = ["en-us", "en-gb-scotland", "en-us+f3", "en-us-nyc+f5", "en-us+caleb"]

    def say(names: list[str]) -> bytes:
        spoken = {
            name: espeak.synthesize(QUESTION, voice=name, speed=160, pitch=50) for name in names
        }
        return b"".join(spoken[name].tobytes() for name in voices)

    first = say(voices)
    time.sleep(1.1)
    assert say(voices[::-1]) == first
    command = [sys.executable, "-c", SAY, QUESTION, *voices]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert other.stdout == first


@pytest.mark.parametrize(
    ("voice", "message"),
    [("xx", "unknown accent 'xx'"), ("en-us+nobody", "unknown variant 'nobody'")],
)
def test_unknown_voices_are_refused(voice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        espeak.synthesize("Red.", voice=voice, speed=160, pitch=50)
