"""data/make_speech.py: the same bytes for the same seed, in every format; resumes; clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="the extra `data` is not installed")

from data.make_speech import main, make_speech

ROOT = Path(__file__).resolve().parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("audio", "sample_rate"), [("wav", 22050), ("mp3", 16000)])
def test_same_seed_same_bytes_whatever_the_workers(
    tmp_path: Path, audio: str, sample_rate: int
) -> None:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "other"]
    for folder, workers, seed in zip(folders, (1, 2, 1), (5, 5, 6), strict=True):
        made = make_speech(
            folder,
            count=20,
            seed=seed,
            turns=2,
            audio=audio,
            sample_rate=sample_rate,
            format="all",
            workers=workers,
            show_progress=False,
        )
        assert made.num_made == made.num_clips
    one, two, other = map(digests, folders)
    assert one == two
    assert one != other
    assert len(one) == made_files(folders[0], audio) + 3
    for path in (folders[0] / audio).rglob("*.*"):
        assert soundfile.info(path).samplerate == sample_rate
        assert np.abs(soundfile.read(path)[0]).max() > 0.1


def made_files(folder: Path, audio: str) -> int:
    return len(list((folder / audio).rglob(f"*.{audio}")))


def test_the_formats_say_the_same(tmp_path: Path) -> None:
    made = make_speech(
        tmp_path, count=8, turns=3, seed=1, distinct=6, format="all", show_progress=False
    )
    rows = read_jsonl(made.files["jsonl"])
    released = json.loads(made.files["instructs2s"].read_text())
    inference = json.loads(made.files["conversations"].read_text())
    assert (made.num_conversations, made.num_turns) == (8, len(rows))
    assert {path.name for path in made.files.values()} == {
        "data.jsonl",
        "instruct_en.json",
        "conversations.json",
    }

    assert [item["id"] for item in released] == [f"instruct_en_{i}" for i in range(8)]
    lengths = {len(item["conversation"]) for item in released}
    assert lengths == {2, 4, 6}
    said = [turn for item in released for turn in item["conversation"]]
    prefix = "data/multiturn_instruction/en/"
    for row, human, gpt, item in zip(rows, said[::2], said[1::2], inference, strict=True):
        question, answer = row["speech_instruction_path"], row["speech_response_path"]
        text, response = row["text_instruction"], row["text_response"]
        assert human == {"from": "human", "speech": prefix + question, "text": text, "unit": None}
        assert gpt == {"from": "gpt", "speech": prefix + answer, "text": response, "unit": None}
        prompt = "<speech>\nPlease directly answer the questions in the user's speech."
        assert item["conversations"] == [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": response},
        ]
        assert item["speech"] == question
        assert set(item) == {"id", "speech", "conversations"}
        assert (tmp_path / question).is_file()
        assert (tmp_path / answer).is_file()
    answer_paths = {(row["text_response"], row["speech_response_path"]) for row in rows}
    assert len(answer_paths) == len({text for text, _ in answer_paths}) <= 6


def test_question_voices_are_kept_apart_and_answers_shared(tmp_path: Path) -> None:
    settings = {"count": 6, "distinct": 6, "show_progress": False}
    first = make_speech(tmp_path / "train", voices=["en-us", "en-gb+m7"], **settings)
    second = make_speech(tmp_path / "held_out", voices=["en-gb-scotland+f4"], **settings)
    train, held_out = (read_jsonl(made.files["jsonl"]) for made in (first, second))
    for a, b in zip(train, held_out, strict=True):
        assert a["text_instruction"] == b["text_instruction"]
        assert a["speech_instruction_path"] != b["speech_instruction_path"]
        assert a["speech_response_path"] == b["speech_response_path"]
        answers = [
            (tmp_path / name / a["speech_response_path"]).read_bytes()
            for name in ("train", "held_out")
        ]
        assert answers[0] == answers[1]


def test_units_fill_both_formats(tmp_path: Path) -> None:
    settings = {"count": 3, "distinct": 3, "format": "all", "show_progress": False}
    rows = read_jsonl(make_speech(tmp_path, **settings).files["jsonl"])
    units = {
        str((tmp_path / row["speech_response_path"]).resolve()): [7, index, 7]
        for index, row in enumerate(rows)
    }
    made = make_speech(tmp_path, units=units, **settings)
    assert made.num_made == 0
    released = json.loads(made.files["instructs2s"].read_text())
    inference = json.loads(made.files["conversations"].read_text())
    assert [item["conversation"][1]["unit"] for item in released] == [
        f"<7><{index}><7>" for index in range(3)
    ]
    assert [item["tgt_units"] for item in inference] == ["7 0 7", "7 1 7", "7 2 7"]
    units.popitem()
    with pytest.raises(ValueError, match="units: none for 1 answers"):
        make_speech(tmp_path, units=units, **settings)


def test_second_run_makes_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    main([str(out), "--count", "4", "--audio", "flac"])
    summary = capsys.readouterr().out
    assert summary.startswith(f"{out}: 4 conversations, 4 turns, 8 clips (8 made, 0 already there)")
    assert summary.count("\n") == 1
    before = digests(out)
    lost = next((out / "flac" / "questions").iterdir())
    lost.unlink()
    main([str(out), "--count", "4", "--audio", "flac"])
    assert "8 clips (1 made, 7 already there)" in capsys.readouterr().out
    assert digests(out) == before
    main([str(out), "--count", "5", "--audio", "flac"])
    assert before.items() - digests(out).items() == {("data.jsonl", before["data.jsonl"])}


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.make_speech", "--count", "100", "--workers", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    make_speech(whole, count=100, show_progress=False)
    clip = max(whole.rglob("*.wav")).relative_to(whole)
    pipe = killed / clip.with_name(f"{clip.name}.part")
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # nobody reads it: the run waits there, and is not done before it is killed
    with subprocess.Popen(
        [*command, str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            while len(list(killed.rglob("*.wav"))) < 10:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not (killed / "data.jsonl").exists()
    pipe.unlink()
    subprocess.run([*command, str(killed)], cwd=ROOT, check=True, capture_output=True)
    assert digests(killed) == digests(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count=0: must be 1 or more"),
        (["--count", "3", "--workers", "0"], "workers=0: must be 1 or more"),
        (["--count", "3", "--distinct", "99999"], "distinct=99999: the chosen categories"),
        (["--count", "3", "--categories", "color"], "categories: unknown color; known: adj"),
        (["--count", "3", "--phrasings", "0"], "phrasings=0: must be 1 or more"),
        (["--count", "3", "--voices", "en-us+zz"], "voice 'en-us+zz': unknown variant"),
        (["--count", "3", "--voices", ","], "voices: give at least one"),
        (["--count", "3", "--speeds", "190", "130"], "speeds=190 130: must rise and lie in 80"),
        (["--count", "3", "--answer-speed", "9"], "answer_speed=9: must rise and lie in 80"),
        (["--count", "3", "--audio", "ogg"], "audio=ogg: choose from wav, flac, mp3"),
        (["--count", "3", "--sample-rate", "12345"], "sample_rate=12345: choose from 8000"),
        (["--count", "3", "--format", "parquet"], "format=parquet: choose from jsonl"),
        (["--count", "3", "--units", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_give_one_message_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_unit_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (("{", "not valid JSON"), ('{"a.wav": ["1"]}', "list of whole")):
        units = tmp_path / "units.json"
        units.write_text(content)
        with pytest.raises(SystemExit):
            main([str(tmp_path / "out"), "--count", "1", "--units", str(units)])
        error = capsys.readouterr().err
        assert str(units) in error
        assert message in error
