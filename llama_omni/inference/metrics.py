"""Defines what `evaluate.py` counts: a `Result` for each record, and their summary.

Error rates are all errors over all reference items together, as in word error rates.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_omni.inference.word_errors import word_error_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_omni.speech.recognizer import Recognizer

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
    "asr": "speech recognizer",
    "asr_wer": "its word error rate against the text",
    "utmos": "UTMOS (1 to 5)",
    "words_per_second": "words a second of speech",
    "first_audio_ms_mean": "first audio after, mean (ms)",
    "first_audio_ms_median": "... median (ms)",
}


@dataclass(kw_only=True)
class Result:
    """Holds one line of results.jsonl."""

    source: str
    line: int
    question_wav: str
    question: str  # transcript, "" where the record has none
    expected: str
    answer: str
    answer_to_silence: str | None = None  # to the question with all samples zero
    is_finished: bool  # False: cut at max_new_tokens
    token_errors: int
    num_expected_tokens: int
    units: list[int] | None
    expected_units: list[int] | None
    unit_errors: int | None
    wav: str | None = None
    wav_seconds: float | None = None
    recognized: str | None = None  # the recognizer's transcript of wav; "" when there is none
    utmos: float | None = None
    first_audio_seconds: float | None


def summarize(results: Sequence[Result], recognizer: Recognizer | None) -> dict[str, Any]:
    """Returns the keys of LABELS, None where there was nothing to measure by.

    Words are Whisper's normalized English ones, and need jiwer.
    """
    right = [r for r in results if r.answer == r.expected]
    to_silence = [r for r in results if r.answer_to_silence is not None]
    with_units = [r for r in results if r.units is not None]
    spoken = [r for r in results if r.wav_seconds]
    transcribed = [r for r in results if r.recognized is not None]
    scores = [r.utmos for r in results if r.utmos is not None]
    delays = [1000 * r.first_audio_seconds for r in results if r.first_audio_seconds is not None]
    spelling = recognizer.spelling if recognizer else {}
    values = {
        "num_records": len(results),
        "exact_match": _ratio(len(right), len(results)),
        "exact_match_silence": _ratio(
            sum(r.answer_to_silence == r.expected for r in to_silence), len(to_silence)
        ),
        "token_error_rate": _ratio(
            sum(r.token_errors for r in results), sum(r.num_expected_tokens for r in results)
        ),
        "word_error_rate": word_error_rate([(r.expected, r.answer) for r in results], spelling),
        "finished_rate": _ratio(sum(r.is_finished for r in results), len(results)),
        "unit_error_rate": _unit_error_rate(results),
        "unit_error_rate_when_right": _unit_error_rate(right),
        "blank_only_rate": _ratio(sum(not r.units for r in with_units), len(with_units)),
        "asr": recognizer.name if recognizer else "none",
        "asr_wer": word_error_rate([(r.answer, r.recognized or "") for r in transcribed], spelling),
        "utmos": statistics.fmean(scores) if scores else None,
        "words_per_second": _ratio(
            sum(len(r.answer.split()) for r in spoken), sum(r.wav_seconds or 0 for r in spoken)
        ),
        "first_audio_ms_mean": statistics.fmean(delays) if delays else None,
        "first_audio_ms_median": statistics.median(delays) if delays else None,
    }
    assert values.keys() == LABELS.keys()
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _unit_error_rate(results: Sequence[Result]) -> float | None:
    counted = [r for r in results if r.unit_errors is not None]
    return _ratio(
        sum(r.unit_errors or 0 for r in counted), sum(len(r.expected_units or []) for r in counted)
    )


def format_table(summary: dict[str, Any]) -> str:
    """Formats the summary as lines of label and value."""
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
