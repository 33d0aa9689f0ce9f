"""Counts what `evaluate.py` reports: a `Result` for each sample, and their summary.

Error rates are all errors over all reference items together, as in word error rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vss_longcat_omni.inference.word_errors import word_error_rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vss_longcat_omni.speech.recognizer import Recognizer

LABELS = {
    "num_samples": "samples",
    "text_loss": "loss of the text (nats a token)",
    "audio_loss": "loss of the codes (nats a code)",
    "semantic_loss": "loss of the semantic codes",
    "text_accuracy": "text tokens right, teacher forced",
    "audio_accuracy": "codes right",
    "semantic_accuracy": "semantic codes right",
    "exact_match": "text exactly right",
    "word_error_rate": "word error rate of the text",
    "finished_rate": "answers that came to an end",
    "asr": "speech recognizer",
    "asr_wer": "its word error rate against the answer's text",
    "answer_wer": "... against the transcript",
    "round_trip_wer": "... of true answers through the codec",
    "duration_error_seconds": "duration error, mean (s)",
    "duration_error_rate": "... of the true duration",
    "real_time_factor": "seconds of computing a second of speech",
}


@dataclass(kw_only=True)
class Result:
    """One line of results.jsonl."""

    name: str  # of the sample
    expected: str | None  # the transcript; None where there is none
    answer: str | None  # the text; None of a model without a text stream
    is_finished: bool  # False: cut at max_frames
    wav: str | None  # None: no sound at all
    seconds: float  # of speech
    true_seconds: float  # of the true answer
    computing_seconds: float  # of generation and decoding
    transcribed: str | None = None  # what the recognizer makes of wav; "" where there is none
    round_trip_transcribed: str | None = None  # ... of the true answer, encoded and decoded


def summarize(
    results: Sequence[Result], losses: dict[str, float], recognizer: Recognizer | None
) -> dict[str, Any]:
    """Return the keys of LABELS; None where there was nothing to measure by.

    `losses` are those of `training.metrics.describe`. Words are Whisper's normalized English ones,
    and need jiwer. The round trip's errors are the recognizer's and the codec's alone.
    """
    spelling = recognizer.spelling if recognizer else {}

    def compare(pairs: Iterable[tuple[str | None, str | None]]) -> float | None:
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        return word_error_rate(known, spelling)

    both = [r for r in results if r.expected is not None and r.answer is not None]
    errors = sum(abs(r.seconds - r.true_seconds) for r in results)
    speech = sum(r.seconds for r in results)
    values = {
        "num_samples": len(results),
        **{key: losses.get(key) for key in LABELS if key.endswith(("_loss", "_accuracy"))},
        "exact_match": _ratio(sum(r.answer == r.expected for r in both), len(both)),
        "word_error_rate": compare((r.expected, r.answer) for r in results),
        "finished_rate": _ratio(sum(r.is_finished for r in results), len(results)),
        "asr": recognizer.name if recognizer else "none",
        "asr_wer": compare((r.answer, r.transcribed) for r in results),
        "answer_wer": compare((r.expected, r.transcribed) for r in results),
        "round_trip_wer": compare((r.expected, r.round_trip_transcribed) for r in results),
        "duration_error_seconds": _ratio(errors, len(results)),
        "duration_error_rate": _ratio(errors, sum(r.true_seconds for r in results)),
        "real_time_factor": _ratio(sum(r.computing_seconds for r in results), speech),
    }
    assert values.keys() == LABELS.keys()
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def format_table(summary: dict[str, Any]) -> str:
    """Format the summary in lines of label and value."""
    width = max(map(len, LABELS.values()))
    lines = [f"{label:{width}}  {_format(key, summary[key])}" for key, label in LABELS.items()]
    return "\n".join(lines) + "\n"


def _format(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        is_share = key == "exact_match" or key.endswith(("_rate", "_wer", "_accuracy"))
        return f"{100 * value:.1f} %" if is_share else f"{value:.3f}"
    return str(value)
