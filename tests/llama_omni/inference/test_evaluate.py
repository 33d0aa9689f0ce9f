"""evaluate.py: every number of the summary against one worked out otherwise."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_omni.evaluate import main
from llama_omni.generate import load_omni_model
from llama_omni.inference.answering import answer
from llama_omni.inference.metrics import LABELS, Result, summarize
from llama_omni.inference.word_errors import word_error_rate
from llama_omni.speech.audio import audio_duration, load_audio
from llama_omni.speech.recognizer import Recognizer
from tests.llama_omni.support.omni_checkpoint import NUM_UNITS, make_omni_checkpoint
from tests.llama_omni.support.tiny import Tiny, make_audio, make_kmeans, write_jsonl

MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_omni_checkpoint(tmp_path_factory.mktemp("omni") / "final_model")
    make_kmeans(folder / "kmeans.safetensors", num_units=NUM_UNITS)
    return folder


@pytest.fixture
def records(model: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Four questions, each with what the model answers to it as expected text and units."""
    omni = load_omni_model(model, device="cpu", dtype=torch.float32)
    found = []
    for i in range(4):
        path = tmp_path / f"q{i}.wav"
        make_audio(path, seconds=0.5 + 0.1 * i, seed=i)
        reply = answer(omni, load_audio(path), max_new_tokens=MAX_NEW_TOKENS)
        found.append(
            {
                "speech_instruction_path": path.name,
                "text_instruction": f"question {i}",
                "text_response": reply.text,
                "tgt_units": reply.units,
            }
        )
    return found


def evaluate(model: Path, data: Path, out: Path, *options: str) -> int:
    argv = [str(model), str(data), "--output_dir", str(out), "--device", "cpu", *options]
    return main([*argv, "--max_new_tokens", str(MAX_NEW_TOKENS)])


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "summary.json").read_text()), [json.loads(line) for line in lines]


def test_counts_what_is_right_and_wrong(
    model: Path, records: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = records[1]["tgt_units"]
    records[1]["tgt_units"] = [*units[:-1], (units[-1] + 1) % NUM_UNITS, units[0]]  # 2 errors
    records[2]["text_response"] = "Nothing of it."
    records[2]["tgt_units"] = records[2]["tgt_units"][2:]  # 2 errors, but the text is wrong too
    data = write_jsonl(tmp_path / "data.jsonl", records)
    assert evaluate(model, data, tmp_path / "out", "--asr", "none", "--silence") == 0
    summary, results = read(tmp_path / "out")
    lengths = [len(record["tgt_units"]) for record in records]
    assert summary["num_records"] == 4
    assert summary["exact_match"] == 0.75
    assert summary["exact_match_silence"] < 0.75
    assert summary["unit_error_rate"] == 4 / sum(lengths)
    assert summary["unit_error_rate_when_right"] == 2 / (sum(lengths) - lengths[2])
    assert [result["unit_errors"] for result in results] == [0, 2, 2, 0]
    assert [result["token_errors"] > 0 for result in results] == [False, False, True, False]
    wrong = results[2]["token_errors"] / sum(r["num_expected_tokens"] for r in results)
    assert summary["token_error_rate"] == wrong
    assert summary["finished_rate"] == 0.0  # random weights never say <|eot_id|>
    assert summary["blank_only_rate"] == 0.0
    assert summary["asr"] == "none"
    assert summary["asr_wer"] is None
    assert summary["first_audio_ms_median"] > 0
    seconds = sum(audio_duration(Path(result["wav"])) for result in results)
    num_words = sum(len(result["answer"].split()) for result in results)
    assert summary["words_per_second"] == pytest.approx(num_words / seconds)
    table = capsys.readouterr().out
    assert all(label in table for label in LABELS.values())
    assert "75.0 %" in table


def test_expected_units_come_from_the_speech_where_they_can(
    model: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Extracted units come before the record's own; the last record has the latter alone."""
    from llama_omni.speech.quantizer import load_quantizer

    for record in records[:3]:
        record["speech_response_path"] = "q0.wav"
    data = write_jsonl(tmp_path / "data.jsonl", records)
    assert evaluate(model, data, tmp_path / "out", "--limit", "4", "--text_only") == 0
    _, results = read(tmp_path / "out")
    extracted = load_quantizer(model / "kmeans.safetensors").extract(
        load_audio(tmp_path / "q0.wav")
    )
    expected = [result["expected_units"] for result in results]
    assert expected == [extracted, extracted, extracted, records[3]["tgt_units"]]
    assert all(result["wav"] is None for result in results)


def test_speech_is_transcribed_by_a_recognizer(
    model: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Pocketsphinx is the default where it is installed; its text is compared with the answer."""
    pytest.importorskip("pocketsphinx")
    data = write_jsonl(tmp_path / "data.jsonl", records[:2])
    assert evaluate(model, data, tmp_path / "out", "--chunk_size", "3") == 0
    summary, results = read(tmp_path / "out")
    assert summary["asr"] == "pocketsphinx en-us"
    pairs = [(result["answer"], result["recognized"]) for result in results]
    assert summary["asr_wer"] == word_error_rate(pairs, {})
    assert summary["exact_match"] == 1.0
    assert summary["unit_error_rate"] == 0.0


def test_answers_the_last_question_of_a_conversation(
    model: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Earlier turns stand in the prompt: another earlier answer makes another prompt."""
    omni = load_omni_model(model, device="cpu", dtype=torch.float32)

    def conversation(first_answer: str) -> dict[str, Any]:
        return {
            "conversation": [
                {"from": "human", "speech": "q0.wav", "text": "question 0"},
                {"from": "gpt", "text": first_answer},
                {"from": "human", "speech": "q1.wav", "text": "question 1"},
                {"from": "gpt", "text": "Something else."},
            ]
        }

    data = write_jsonl(tmp_path / "data.jsonl", [conversation("Four."), conversation("Red, blue.")])
    assert evaluate(model, data, tmp_path / "out", "--text_only") == 0
    _, results = read(tmp_path / "out")
    assert results[0]["answer"] != results[1]["answer"]
    assert results[0]["question"] == "question 1"
    alone = answer(omni, load_audio(tmp_path / "q1.wav"), max_new_tokens=MAX_NEW_TOKENS)
    assert alone.text not in (results[0]["answer"], results[1]["answer"])


def test_leaves_out_bad_records_and_names_them(
    model: Path,
    records: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_audio(tmp_path / "long.wav", seconds=31, seed=0)
    records[1]["speech_instruction_path"] = "long.wav"
    records[2]["speech_instruction_path"] = "absent.wav"
    data = write_jsonl(tmp_path / "data.jsonl", records)
    assert evaluate(model, data, tmp_path / "out", "--text_only") == 0
    assert [result["line"] for result in read(tmp_path / "out")[1]] == [1, 4]
    assert "data.jsonl:2: " in caplog.text
    assert "data.jsonl:3: " in caplog.text
    data = write_jsonl(tmp_path / "bad.jsonl", records[1:3])
    assert evaluate(model, data, tmp_path / "none", "--text_only") == 1
    assert "no usable record" in capsys.readouterr().err


def test_a_stage_1_model_is_scored_by_its_text(tiny: Tiny, tmp_path: Path) -> None:
    assert evaluate(tiny.stage1_model, tiny.data, tmp_path / "out", "--limit", "2") == 0
    summary, results = read(tmp_path / "out")
    assert summary["num_records"] == len(results) == 2
    assert summary["token_error_rate"] > 0
    for key in ("unit_error_rate", "blank_only_rate", "asr_wer", "first_audio_ms_mean"):
        assert summary[key] is None


def test_asked_for_what_is_missing(
    model: Path,
    records: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the extra installed, whatever asks for it gets an error that names it."""
    data = write_jsonl(tmp_path / "data.jsonl", records[:1])
    for module in ("speech.recognizer", "speech.utmos", "inference.word_errors", "evaluate"):
        monkeypatch.setattr(f"llama_omni.{module}.is_installed", lambda package: False)
    for options in (["--asr", "pocketsphinx"], ["--asr", "whisper:x"], ["--utmos"]):
        assert evaluate(model, data, tmp_path / "out", *options) == 1
        assert "extra 'eval'" in capsys.readouterr().err
    assert evaluate(model, data, tmp_path / "out") == 0
    assert "jiwer is missing" in caplog.text
    summary, _ = read(tmp_path / "out")
    assert summary["asr"] == "none"
    assert summary["word_error_rate"] is None
    assert summary["exact_match"] == 1.0
    assert evaluate(model, data, tmp_path / "out", "--asr", "siri") == 1


def result(answer: str, expected: str = "a", **changes: Any) -> Result:
    values: dict[str, Any] = {
        "source": "data.jsonl",
        "line": 1,
        "question_wav": "q.wav",
        "question": "",
        "expected": expected,
        "answer": answer,
        "is_finished": True,
        "token_errors": 0,
        "num_expected_tokens": 1,
        "units": [1],
        "expected_units": [1],
        "unit_errors": 0,
        "first_audio_seconds": None,
    }
    return Result(**values | changes)


def test_summary_worked_out_by_hand() -> None:
    results = [
        result(
            "One, two three!",
            expected="one two three",
            recognized="one too three",
            wav_seconds=2.0,
            utmos=3.0,
            first_audio_seconds=0.1,
        ),
        result("Four.", expected="For", recognized="", units=[], unit_errors=1, is_finished=False),
        result("five", expected="five", wav_seconds=0.5, utmos=4.0, first_audio_seconds=0.4),
    ]
    recognizer = Recognizer("silent", lambda waveform: "", {})
    summary = summarize(results, recognizer)
    assert summary["exact_match"] == pytest.approx(1 / 3)
    assert summary["exact_match_silence"] is None
    # After normalizing, "1 2 3" and "5" are right, "4" for "for" is not.
    assert summary["word_error_rate"] == word_error_rate(
        [("one two three", "One, two three!"), ("For", "Four."), ("five", "five")], {}
    )
    assert 0 < summary["word_error_rate"] < 1
    assert summary["asr"] == "silent"
    assert summary["finished_rate"] == pytest.approx(2 / 3)
    assert summary["blank_only_rate"] == pytest.approx(1 / 3)
    assert summary["unit_error_rate"] == pytest.approx(1 / 3)
    assert summary["utmos"] == 3.5
    assert summary["words_per_second"] == pytest.approx(4 / 2.5)
    assert summary["first_audio_ms_mean"] == pytest.approx(250)
    assert all(
        value is None or not isinstance(value, float) or math.isfinite(value)
        for value in summary.values()
    )
    empty = summarize([], None)
    assert {key for key, value in empty.items() if value is not None} == {"num_records", "asr"}


def test_word_error_rate_counts_all_pairs_together() -> None:
    pairs = [("The cat is big.", "the CAT is small"), ("Yes", "yes yes"), ("?!", "not counted")]
    assert word_error_rate(pairs, {}) == pytest.approx(2 / 5)  # a substitution and an insertion
    british, american = "colour", "color"  # codespell:ignore colour
    assert word_error_rate([(british, american)], {british: american}) == 0.0
    assert word_error_rate([("", "x")], {}) is None
