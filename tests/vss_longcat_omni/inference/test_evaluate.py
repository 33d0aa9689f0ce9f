"""evaluate.py: every number of the summary against one worked out otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vss_longcat_omni import train_ds
from vss_longcat_omni.dataset.folders import find_samples, read_transcript
from vss_longcat_omni.dataset.prepare import prepare
from vss_longcat_omni.evaluate import main
from vss_longcat_omni.inference import answerer as answering
from vss_longcat_omni.inference import measure
from vss_longcat_omni.inference.answerer import load_answerer
from vss_longcat_omni.inference.measure import answer_sample, evaluate
from vss_longcat_omni.inference.metrics import LABELS, Result, summarize
from vss_longcat_omni.inference.word_errors import word_error_rate
from vss_longcat_omni.media.audio import audio_duration, load_audio
from vss_longcat_omni.speech.fit_codec import fit_codec
from vss_longcat_omni.speech.recognizer import Recognizer

if TYPE_CHECKING:
    from torch import Tensor

    from tests.vss_longcat_omni.conftest import Ground
    from vss_longcat_omni.dataset.prepare import PreparedSample
    from vss_longcat_omni.inference.answerer import Answerer

MAX_FRAMES = 12


@pytest.fixture(scope="module")
def codec(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "codec"
    fit_codec([sample.output_audio for sample in find_samples(ground.data)], folder)
    return folder


@pytest.fixture
def answerer(ground: Ground, codec: Path) -> Answerer:
    return load_answerer(str(ground.model), codec_folder=codec, max_frames=MAX_FRAMES)


@pytest.fixture
def prepared(ground: Ground, codec: Path, answerer: Answerer) -> list[PreparedSample]:
    samples, cache = find_samples(ground.data, "test"), codec.parent / "cache"
    return prepare(samples, answerer.settings, answerer.codec, cache, num_workers=2)


def argv_of(ground: Ground, codec_folder: Path, out: Path, **options: Any) -> list[str]:
    values = {
        "model_name_or_path": ground.model,
        "codec": codec_folder,
        "data_dir": ground.data,
        "cache_dir": codec_folder.parent / "cache",
        "out": out,
        "max_frames": MAX_FRAMES,
        "tensorboard_dir": "",
        "device": "cpu",
    } | options
    return [arg for name, value in values.items() for arg in (f"--{name}", str(value))]


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "summary.json").read_text()), [json.loads(line) for line in lines]


def test_losses_are_those_of_training(ground: Ground, tmp_path: Path) -> None:
    """Compares the model that a step of training leaves with what that run itself logged."""
    options = {"deepspeed": "", "bf16": False, "tuning": "full", "max_steps": 1, "save_steps": 1}
    train_ds.main(ground.argv(tmp_path / "out", **options, eval_strategy="steps", eval_steps=1))
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    (logged,) = [entry for entry in state["log_history"] if "eval_loss" in entry]
    report = tmp_path / "report"
    changes = {"model_name_or_path": tmp_path / "out", "cache_dir": ground.cache, "asr": "none"}
    main(argv_of(ground, ground.cache / "codec", report, **changes, max_frames=2))
    summary, _ = read(report)
    for term in ("text", "audio", "semantic"):
        for kind in ("loss", "accuracy"):
            wanted = logged[f"eval_{term}_{kind}"]
            assert summary[f"{term}_{kind}"] == pytest.approx(wanted, rel=1e-4), term
    assert summary["text_loss"] > 0.5


def test_answers_are_those_of_generate(
    answerer: Answerer, prepared: list[PreparedSample], tmp_path: Path
) -> None:
    """The recognizer transcribes any speech as the first true answer."""
    expected = [read_transcript(p.sample.transcript) for p in prepared if p.sample.transcript]
    sounds: list[Tensor] = []

    def transcribe(waveform: Tensor) -> str:
        sounds.append(waveform)
        return expected[0]

    fixed = Recognizer("fixed", transcribe, {})
    summary = evaluate(answerer, prepared, out=tmp_path / "report", recognizer=fixed)
    written, results = read(tmp_path / "report")
    assert written == summary
    assert [r["name"] for r in results] == [p.sample.name for p in prepared]
    for sample, result in zip(prepared, results, strict=True):
        answer = answerer.answer(sample.sample.video, sample.sample.input_audio)
        assert (result["answer"], result["is_finished"]) == (answer.text, answer.is_finished)
        seconds = len(answer.codes) * 0.06
        assert result["seconds"] == pytest.approx(seconds)
        assert audio_duration(Path(result["wav"])) == pytest.approx(seconds)
        assert result["true_seconds"] == audio_duration(sample.sample.output_audio)
        assert result["computing_seconds"] > 0
    assert [r["expected"] for r in results] == expected
    round_trips = [answerer.codec.decode(p.codes) for p in prepared]
    assert all(torch.equal(a, b) for a, b in zip(sounds[1::2], round_trips, strict=True))
    pairs = [(text, expected[0]) for text in expected]
    assert summary["round_trip_wer"] == word_error_rate(pairs, {}) == summary["answer_wer"]
    errors = [abs(r["seconds"] - r["true_seconds"]) for r in results]
    assert summary["duration_error_seconds"] == pytest.approx(sum(errors) / 3)


def test_the_command_and_its_sounds_in_tensorboard(
    ground: Ground, codec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pocketsphinx")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    main(argv_of(ground, codec, tmp_path / "report", tensorboard_dir=logs, count=2))
    summary, results = read(tmp_path / "report")
    assert summary["num_samples"] == len(results) == 2
    assert summary["asr"] == "pocketsphinx en-us"
    assert summary["asr_wer"] is not None
    assert 0 <= summary["round_trip_wer"] < 1
    assert summary["real_time_factor"] > 0
    table = capsys.readouterr().out
    assert all(label in table for label in LABELS.values())
    events = EventAccumulator(str(logs)).Reload()
    names = [result["name"] for result in results]
    tags = [f"{name}/{kind}" for name in names for kind in ("answer", "true answer")]
    assert sorted(events.Tags()["audio"]) == sorted(tags)
    (sound,) = events.Audio(f"{names[0]}/true answer")
    speech = load_audio(ground.data / "test" / names[0] / "output.wav")
    assert (sound.sample_rate, sound.length_frames) == (16000, len(speech))
    text = events.Tensors(f"{names[0]}/texts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"true: {results[0]['expected']}" in text


def test_a_model_without_text_is_measured_by_its_speech(
    ground: Ground, codec: Path, tmp_path: Path
) -> None:
    options = {"transcripts": "none", "asr": "none", "count": 1}
    main(argv_of(ground, codec, tmp_path / "report", **options))
    summary, (result,) = read(tmp_path / "report")
    assert result["answer"] is None
    assert result["expected"]
    for key in ("exact_match", "word_error_rate", "asr_wer", "round_trip_wer", "text_loss"):
        assert summary[key] is None, key
    assert summary["audio_loss"] > 1


def test_an_answer_without_sound_has_lost_all_its_words(
    answerer: Answerer, prepared: list[PreparedSample], tmp_path: Path
) -> None:
    result, _ = answer_sample(answerer, prepared[0])
    fixed = Recognizer("fixed", lambda waveform: "x", {})
    silence = torch.empty(0)
    measure.score(result, silence, answerer, prepared[0], out=tmp_path, recognizer=fixed)
    assert (result.wav, result.transcribed, result.round_trip_transcribed) == (None, "", "x")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_reported_before_weights_are_read(
    ground: Ground,
    codec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(answering, "load_answerer", fail)
    absent = tmp_path / "absent"
    for changes, message in (
        ({"model_name_or_path": absent}, "model_name_or_path=.*absent: no such file or folder"),
        ({"model_name_or_path": tmp_path}, "no config.json: not a LongCat-Flash-Omni folder"),
        ({"adapter": absent}, "adapter=.*absent: no such file or folder"),
        ({"adapter": tmp_path}, "--adapter .*: no adapter_config.json"),
        ({"codec": absent}, "--codec .*absent: no such folder"),
        ({"data_dir": absent}, "No valid samples found"),
        ({"asr": "siri"}, "--asr siri: give whisper:"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(argv_of(ground, codec, tmp_path / "report", **changes))
    monkeypatch.setattr(measure, "is_installed", lambda package: False)
    with pytest.raises(ValueError, match="word errors need jiwer; install the extra 'eval'"):
        main(argv_of(ground, codec, tmp_path / "report", asr="pocketsphinx"))
    with pytest.raises(AssertionError, match="weights are read"):
        main(argv_of(ground, codec, tmp_path / "report", asr="none"))
    assert "jiwer is missing" in caplog.text
    assert "no ASR-WER" in caplog.text
    assert not (tmp_path / "report").exists()
    command = [sys.executable, "-m", "vss_longcat_omni.evaluate"]
    command += argv_of(ground, absent, tmp_path / "report")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --codec {absent}: no such folder")


def result(answer: str | None, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "name": "01",
        "expected": "a",
        "answer": answer,
        "is_finished": True,
        "wav": "01.wav",
        "seconds": 1.0,
        "true_seconds": 1.0,
        "computing_seconds": 0.5,
    }
    return Result(**values | changes)


def test_summary_worked_out_by_hand() -> None:
    results = [
        result(
            "it moves up",
            expected="it moves up",
            transcribed="it moves a cup",
            round_trip_transcribed="it moved up",
            seconds=1.5,
        ),
        result("It is red.", expected="it is red", transcribed="it is red",
               round_trip_transcribed="it is red"),
        result("", expected="it is a star", transcribed="", round_trip_transcribed="it",
               is_finished=False, seconds=0.0, true_seconds=2.0, computing_seconds=0.1),
        result("yes", expected=None, transcribed="yes", round_trip_transcribed="no"),
    ]  # fmt: skip
    summary = summarize(results, {"text_loss": 1.25}, Recognizer("fixed", lambda waveform: "", {}))
    assert summary["num_samples"] == 4
    assert summary["text_loss"] == 1.25
    assert summary["audio_loss"] is None
    assert summary["exact_match"] == pytest.approx(1 / 3)  # as they are written
    assert summary["word_error_rate"] == pytest.approx(4 / 10)  # the third has lost four words
    assert summary["asr"] == "fixed"
    assert summary["asr_wer"] == pytest.approx(2 / 7)  # "up" became "a cup"
    assert summary["answer_wer"] == pytest.approx((2 + 4) / 10)
    assert summary["round_trip_wer"] == pytest.approx((1 + 3) / 10)
    assert summary["finished_rate"] == 0.75
    assert summary["duration_error_seconds"] == pytest.approx(2.5 / 4)
    assert summary["duration_error_rate"] == pytest.approx(2.5 / 5)
    assert summary["real_time_factor"] == pytest.approx(1.6 / 3.5)
    empty = summarize([], {}, None)
    assert {key for key, value in empty.items() if value is not None} == {"num_samples", "asr"}
    mute = summarize([result(None), result(None, expected="b")], {}, None)
    assert mute["exact_match"] is None


def test_word_error_rate_counts_all_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("The cat is big.", "the CAT is small"), ("Yes", "yes yes"), ("?!", "not counted")]
    assert word_error_rate(pairs, {}) == pytest.approx(2 / 5)  # a substitution and an insertion
    british, american = "colour", "color"  # codespell:ignore colour
    assert word_error_rate([(british, american)], {british: american}) == 0.0
    assert word_error_rate([("", "x")], {}) is None
    target = "vss_longcat_omni.inference.word_errors.is_installed"
    monkeypatch.setattr(target, lambda package: False)
    assert word_error_rate(pairs, {}) is None
