"""What `evaluate.py` counts: a `Result` for each sample, and their summary.

Error rates are all errors over all reference items together, as in word error rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vss_longcat_omni.speech.recognizer import is_installed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vss_longcat_omni.speech.recognizer import Recogniser

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
    "asr": "speech recogniser",
    "asr_wer": "its word error rate against the text said",
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
    said: str | None  # the text; None of a model without a text stream
    is_finished: bool  # False: cut at max_rows
    wav: str | None  # None: no sound at all
    seconds: float  # of speech
    true_seconds: float  # of the true answer
    computing_seconds: float  # of generation and decoding
    heard: str | None = None  # what the recogniser makes of wav; "" where there is none
    round_trip_heard: str | None = None  # ... of the true answer, encoded and decoded


def summarise(
    results: Sequence[Result], losses: dict[str, float], recogniser: Recogniser | None
) -> dict[str, Any]:
    """The keys of LABELS; None where there was nothing to measure by.

    `losses` are those of `training.metrics.describe`. Words are Whisper's normalised English ones,
    and need jiwer. The round trip's errors are the recogniser's and the codec's alone.
    """
    spelling = recogniser.spelling if recogniser else {}

    def compare(pairs: Iterable[tuple[str | None, str | None]]) -> float | None:
        known = [(text, heard) for text, heard in pairs if text is not None and heard is not None]
        return word_error_rate(known, spelling)

    both = [r for r in results if r.expected is not None and r.said is not None]
    errors = sum(abs(r.seconds - r.true_seconds) for r in results)
    speech = sum(r.seconds for r in results)
    values = {
        "num_samples": len(results),
        **{key: losses.get(key) for key in LABELS if key.endswith(("_loss", "_accuracy"))},
        "exact_match": _ratio(sum(r.said == r.expected for r in both), len(both)),
        "word_error_rate": compare((r.expected, r.said) for r in results),
        "finished_rate": _ratio(sum(r.is_finished for r in results), len(results)),
        "asr": recogniser.name if recogniser else "none",
        "asr_wer": compare((r.said, r.heard) for r in results),
        "answer_wer": compare((r.expected, r.heard) for r in results),
        "round_trip_wer": compare((r.expected, r.round_trip_heard) for r in results),
        "duration_error_seconds": _ratio(errors, len(results)),
        "duration_error_rate": _ratio(errors, sum(r.true_seconds for r in results)),
        "real_time_factor": _ratio(sum(r.computing_seconds for r in results), speech),
    }
    assert values.keys() == LABELS.keys()
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


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


def format_table(summary: dict[str, Any]) -> str:
    """The summary in lines of label and value."""
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
