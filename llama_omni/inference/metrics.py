"""What `evaluate.py` counts: a `Result` for each record, and their summary.

Error rates are all errors over all reference items together, as in word error rates.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_omni.speech.recognizer import is_installed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_omni.speech.recognizer import Recogniser

LABELS = {
    "num_records": "questions",
    "exact_match": "text exactly right",
    "exact_match_silence": "... with the speech replaced by silence",
    "token_error_rate": "token error rate of the text",
    "word_error_rate": "word error rate of the text",
    "finished_rate": "answers that came to an end",
    "unit_error_rate": "unit error rate",
    "unit_error_rate_when_right": "... of answers with the right text",
    "blank_only_rate": "answers without any unit",
    "asr": "speech recogniser",
    "asr_wer": "its word error rate against the text",
    "utmos": "UTMOS (1 to 5)",
    "words_per_second": "words a second of speech",
    "first_audio_ms_mean": "first audio after, mean (ms)",
    "first_audio_ms_median": "... median (ms)",
}


@dataclass(kw_only=True)
class Result:
    """One line of results.jsonl."""

    source: str
    line: int
    question_wav: str
    question: str  # transcript, "" where the record has none
    expected: str
    said: str
    said_to_silence: str | None = None  # the answer when the question's samples are all zero
    is_finished: bool  # False: cut at max_new_tokens
    token_errors: int
    num_expected_tokens: int
    units: list[int] | None
    expected_units: list[int] | None
    unit_errors: int | None
    wav: str | None = None
    wav_seconds: float | None = None
    recognised: str | None = None  # what the recogniser heard in wav; "" when there is none
    utmos: float | None = None
    first_audio_seconds: float | None


def summarise(results: Sequence[Result], recogniser: Recogniser | None) -> dict[str, Any]:
    """The keys of LABELS; None where there was nothing to measure by.

    Words are Whisper's normalised English ones, and need jiwer.
    """
    right = [r for r in results if r.said == r.expected]
    to_silence = [r for r in results if r.said_to_silence is not None]
    with_units = [r for r in results if r.units is not None]
    spoken = [r for r in results if r.wav_seconds]
    heard = [r for r in results if r.recognised is not None]
    scores = [r.utmos for r in results if r.utmos is not None]
    delays = [1000 * r.first_audio_seconds for r in results if r.first_audio_seconds is not None]
    spelling = recogniser.spelling if recogniser else {}
    values = {
        "num_records": len(results),
        "exact_match": _ratio(len(right), len(results)),
        "exact_match_silence": _ratio(
            sum(r.said_to_silence == r.expected for r in to_silence), len(to_silence)
        ),
        "token_error_rate": _ratio(
            sum(r.token_errors for r in results), sum(r.num_expected_tokens for r in results)
        ),
        "word_error_rate": word_error_rate([(r.expected, r.said) for r in results], spelling),
        "finished_rate": _ratio(sum(r.is_finished for r in results), len(results)),
        "unit_error_rate": _unit_error_rate(results),
        "unit_error_rate_when_right": _unit_error_rate(right),
        "blank_only_rate": _ratio(sum(not r.units for r in with_units), len(with_units)),
        "asr": recogniser.name if recogniser else "none",
        "asr_wer": word_error_rate([(r.said, r.recognised or "") for r in heard], spelling),
        "utmos": statistics.fmean(scores) if scores else None,
        "words_per_second": _ratio(
            sum(len(r.said.split()) for r in spoken), sum(r.wav_seconds or 0 for r in spoken)
        ),
        "first_audio_ms_mean": statistics.fmean(delays) if delays else None,
        "first_audio_ms_median": statistics.median(delays) if delays else None,
    }
    assert values.keys() == LABELS.keys()
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _unit_error_rate(results: Sequence[Result]) -> float | None:
    judged = [r for r in results if r.unit_errors is not None]
    return _ratio(
        sum(r.unit_errors or 0 for r in judged), sum(len(r.expected_units or []) for r in judged)
    )


def word_error_rate(pairs: Sequence[tuple[str, str]], spelling: dict[str, str]) -> float | None:
    """Of (reference, hypothesis) pairs together, after Whisper's English text normaliser on both.

    None when jiwer is missing or no reference holds a word. `spelling`: see `Recogniser`.
    """
    if not is_installed("jiwer"):
        return None
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalise = EnglishTextNormalizer(spelling)
    normalised = [(normalise(reference), normalise(heard)) for reference, heard in pairs]
    kept = [pair for pair in normalised if pair[0]]
    if not kept:
        return None
    return jiwer.wer([reference for reference, _ in kept], [heard for _, heard in kept])


def edit_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Insertions, deletions and substitutions (Levenshtein) between two lists."""
    previous = list(range(len(right) + 1))
    for row, item in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right, 1):
            best = min(previous[column], current[-1]) + 1
            current.append(min(best, previous[column - 1] + (item != other)))
        previous = current
    return previous[-1]


def format_table(summary: dict[str, Any]) -> str:
    """The summary in lines of label and value."""
    width = max(map(len, LABELS.values()))
    lines = [f"{label:{width}}  {_format(key, summary[key])}" for key, label in LABELS.items()]
    return "\n".join(lines) + "\n"


def _format(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        is_share = key.startswith("exact_match") or "_rate" in key or key.endswith("_wer")
        return f"{100 * value:.1f} %" if is_share else f"{value:.2f}"
    return str(value)
