"""The shares are those of the lines; PocketSphinx recognizes which answer a wav is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from vss_longcat_omni.dataset.folders import find_samples, read_transcript
from vss_longcat_omni.media.audio import load_audio
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.speech.fit_codec import fit_codec
from vss_longcat_omni.tools import closed_questions

if TYPE_CHECKING:
    from pathlib import Path

    from tests.vss_longcat_omni.conftest import Ground


def line(expected: str, *, answer: str, blind: str, deaf: str, transcribed: str) -> dict[str, str]:
    return {
        "expected": expected,
        "answer": answer,
        "answer_without_video": blind,
        "answer_without_question": deaf,
        "transcribed": transcribed,
        "target_transcribed": expected,
    }


def test_shares_of_right_answers() -> None:
    answers = [
        line(
            "it is red",
            answer="it is red",
            blind="it is blue",
            deaf="it is red",
            transcribed="it is red",
        ),
        line(
            "it is red", answer="it is red", blind="it is red", deaf="it is a star", transcribed=""
        ),
        line(
            "it is a star", answer="it is red", blind="it is red", deaf="it is red", transcribed="x"
        ),
        line(
            "it moves up",
            answer="it moves up",
            blind="it is red",
            deaf="it is red",
            transcribed="x",
        ),
    ]
    assert closed_questions.summarize(answers) == {
        "questions": 4,
        "answer_right": 0.75,
        "answer_without_video_right": 0.25,
        "answer_without_question_right": 0.25,
        "transcribed_right": 0.25,
        "target_transcribed_right": 1.0,
        "transcribed_as_answer": 0.25,
        "most_frequent_answer": 0.5,
    }


def test_asked_and_transcribed(ground: Ground, tmp_path: Path) -> None:
    """A model that has learned nothing: every condition is asked, hardly anything is right."""
    pytest.importorskip("pocketsphinx")
    codec = tmp_path / "codec"
    fit_codec([sample.output_audio for sample in find_samples(ground.data)], codec)
    common = ["--codec", str(codec), "--data_dir", str(ground.data), "--out", str(tmp_path / "out")]
    model = ["--model_name_or_path", str(ground.model), "--max_frames", "12", "--device", "cpu"]
    closed_questions.main(["ask", *common, *model])
    lines = [json.loads(x) for x in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(set(closed_questions.CONDITIONS) < set(answer) for answer in lines)
    closed_questions.main(["transcribe", *common])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["questions"] == 3
    assert summary["answer_right"] == 0


def test_true_answers_are_recognized_through_the_codec(ground: Ground, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    samples = find_samples(ground.data)
    fit_codec([sample.output_audio for sample in samples], tmp_path / "codec")
    codec = open_codec(str(tmp_path / "codec"))
    answers = {s.name: read_transcript(s.transcript) for s in samples if s.transcript}
    recognize = closed_questions.load_closed_recognizer(sorted(set(answers.values())))
    right = 0
    for sample in samples:
        speech = codec.decode(codec.encode(load_audio(sample.output_audio)))
        right += recognize(speech) == answers[sample.name]
    assert right >= 10  # of 12
