"""The word error rate of speech that a recognizer heard, or of a written answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_omni.speech.recognizer import is_installed

if TYPE_CHECKING:
    from collections.abc import Sequence


def word_error_rate(pairs: Sequence[tuple[str, str]], spelling: dict[str, str]) -> float | None:
    """Return all errors over all words of (reference, hypothesis) pairs, by jiwer.

    Both sides go through Whisper's English text normalizer first, with the `spelling` of
    `Recognizer`. None when jiwer is missing or no reference holds a word.
    """
    if not is_installed("jiwer"):
        return None
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer(spelling)
    normalized = [(normalize(reference), normalize(heard)) for reference, heard in pairs]
    kept = [pair for pair in normalized if pair[0]]
    if not kept:
        return None
    return jiwer.wer([reference for reference, _ in kept], [heard for _, heard in kept])
