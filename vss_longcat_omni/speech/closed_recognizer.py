"""Recognizes by PocketSphinx which of a few sentences a waveform is, for closed questions.

tools/closed_questions.py measures a model by it. A waveform is (num_samples,) float32 at 16 kHz.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vss_longcat_omni.speech.recognizer import (
    NEEDS_EVAL,
    ROOM_NOISE,
    SAMPLE_RATE,
    is_installed,
    transcribe_by_sphinx,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def load_closed_recognizer(sentences: Sequence[str]) -> Callable[[Tensor], str]:
    """Return a recognizer of these sentences, which returns one of them, or "".

    Raises:
        ValueError: the package is missing.
    """
    choices = " | ".join(sentences)
    return load_grammar(f"#JSGF V1.0; grammar answers; public <one> = {choices};")


def load_grammar(text: str, *, room_noise: float = ROOM_NOISE) -> Callable[[Tensor], str]:
    """Return a recognizer of a grammar in JSGF, which is faster where sentences are many.

    Raises:
        ValueError: the package is missing.
    """
    if not is_installed("pocketsphinx"):
        raise ValueError(f"pocketsphinx is not installed; {NEEDS_EVAL}")
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL", lm=None)
    decoder.add_jsgf_string("answers", text)
    decoder.activate_search("answers")
    return lambda waveform: transcribe_by_sphinx(decoder, waveform, room_noise)
