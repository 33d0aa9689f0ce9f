"""data/make_vss.py: the same bytes for the same arguments, both senses needed, splits, errors."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import soundfile

from data import make_vss as make_vss_module
from data.espeak import SAMPLE_RATE, synthesize, validate_voice
from data.make_vss import (
    ANSWER_PITCH,
    ANSWER_SPEED,
    ANSWER_VOICE,
    QUESTIONS,
    SPLITS,
    VALUES,
    VOICES,
    list_answers,
    main,
    make_vss,
    read_facts,
    talk_of,
)
from data.shapes import Combination, is_held_out, read_video

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {"width": 64, "height": 64, "fps": 8, "show_progress": False}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.dist
def test_same_arguments_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for folder, workers, seed in ((one, 1, 5), (two, 2, 5), (other, 1, 6)):
        made = make_vss(folder, count=20, seed=seed, workers=workers, **SMALL)
        assert (made.folder, made.num_samples, made.num_made) == (folder, 20, 20)
    assert digests(one) == digests(two)
    for name in ("input.mp4", "input.wav"):
        assert not {digests(f)[f"{n:02d}/{name}"] for f in (one,) for n in range(1, 21)} & {
            digests(other)[f"{n:02d}/{name}"] for n in range(1, 21)
        }
    names = ("input.mp4", "input.wav", "output.txt", "output.wav")
    files = {f"{number:02d}/{name}" for number in range(1, 21) for name in names}
    assert set(digests(one)) == files | {".facts.json"}


def test_files_are_what_the_facts_say(tmp_path: Path) -> None:
    make_vss(tmp_path, count=30, seed=1, split="test", **SMALL)
    facts = read_facts(tmp_path)
    assert list(facts) == [f"{number:02d}" for number in range(1, 31)]
    answers = set()
    for name, fact in facts.items():
        frames = decode(tmp_path / name / "input.mp4")
        assert frames.shape == (16, 64, 64, 3)
        assert read_video(frames) == (fact["color"], fact["direction"])
        assert (tmp_path / name / "output.txt").read_text() == fact["answer"] + "\n"
        assert fact[fact["kind"]] == fact["value"]
        assert fact["answer"].endswith(f" {fact['value']}")
        assert fact["question"] in QUESTIONS[fact["kind"]]
        samples, rate = soundfile.read(tmp_path / name / "output.wav", dtype="int16")
        spoken = synthesize(
            fact["answer"], voice=ANSWER_VOICE, speed=ANSWER_SPEED, pitch=ANSWER_PITCH
        )
        assert rate == SAMPLE_RATE
        assert np.array_equal(samples, spoken)
        info = soundfile.info(tmp_path / name / "input.wav")
        assert 0.7 < info.duration < 3
        answers.add(fact["answer"])
    assert answers == set(list_answers())  # colors take longest: 8 of them, every third sample


@pytest.mark.parametrize("split", SPLITS)
def test_guessing_and_one_sense_alone_do_not_help(split: str) -> None:
    """Each kind and value is equally often, and what is shown does not tell what is asked."""
    count = 3 * 40 * 40  # 40: all values of each kind equally often
    talks = [talk_of(0, index, split=split) for index in range(count)]
    for kind, values in VALUES.items():
        asked = [talk for talk in talks if talk.kind == kind]
        assert Counter(talk.value for talk in asked) == dict.fromkeys(
            values, count // 3 // len(values)
        )
        assert {talk.question for talk in asked} == set(QUESTIONS[kind])
        assert all(getattr(talk.scene, kind) == talk.value for talk in asked)
    # The same picture is asked about in all three ways: the question is needed.
    kinds: dict[tuple[str, ...], set[str]] = {}
    for talk in talks:
        scene = talk.scene
        kinds.setdefault((scene.color, scene.shape, scene.direction), set()).add(talk.kind)
    assert all(len(each) == 3 for each in kinds.values())
    # No word of a question says what is shown.
    words = {word for each in QUESTIONS.values() for text in each for word in text.lower().split()}
    assert not words & {value for values in VALUES.values() for value in values}


def test_the_splits_share_neither_combinations_nor_voices(tmp_path: Path) -> None:
    shown: dict[str, set[Combination]] = {}
    for split in SPLITS:
        talks = [talk_of(0, index, split=split) for index in range(1500)]
        shown[split] = {
            Combination(talk.scene.color, talk.scene.shape, talk.scene.direction) for talk in talks
        }
        assert {is_held_out(each) for each in shown[split]} == {split == "test"}
        assert {talk.voice for talk in talks} == set(VOICES[split])
    assert {len(each) for each in shown.values()} == {126, 34}
    variants = [{voice.partition("+")[2] for voice in voices} for voices in VOICES.values()]
    assert not variants[0] & variants[1]
    assert ANSWER_VOICE.partition("+")[2] not in variants[0] | variants[1]
    for voice in (*VOICES["train"], *VOICES["test"], ANSWER_VOICE):
        validate_voice(voice)


def test_every_answer_has_a_codec_frame_for_each_letter_and_is_understood() -> None:
    sphinx = pytest.importorskip("pocketsphinx")
    import soxr

    grammar = f"#JSGF V1.0;\ngrammar a;\npublic <a> = {' | '.join(list_answers())};\n"
    decoder = sphinx.Decoder(samprate=16000, loglevel="FATAL", lm=None)
    decoder.add_jsgf_string("answers", grammar)
    decoder.activate_search("answers")
    for text in list_answers():
        speech = synthesize(text, voice=ANSWER_VOICE, speed=ANSWER_SPEED, pitch=ANSWER_PITCH)
        assert math.ceil(len(speech) * 16000 / SAMPLE_RATE / 960) >= len(text) + 4
        decoder.reinit_feat()
        decoder.start_utt()
        decoder.process_raw(soxr.resample(speech, SAMPLE_RATE, 16000).tobytes(), full_utt=True)
        decoder.end_utt()
        assert decoder.hyp().hypstr == text


def test_second_run_makes_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = [str(out), "--width", "32", "--height", "32", "--seconds", "0.5", "--workers", "1"]
    main([*command, "--count", "4"])
    assert capsys.readouterr().out == f"{out}: 4 samples (4 made, 0 already there)\n"
    before = digests(out)
    (out / "02" / "input.mp4").unlink()
    (out / "04" / "output.txt").unlink()
    kept = (out / "04" / "input.mp4").stat().st_mtime_ns
    main([*command, "--count", "4"])
    assert capsys.readouterr().out == f"{out}: 4 samples (2 made, 2 already there)\n"
    assert digests(out) == before
    assert (out / "04" / "input.mp4").stat().st_mtime_ns == kept
    main([*command, "--count", "6"])
    after = digests(out)
    assert {name: after[name] for name in before if name != ".facts.json"}.items() < after.items()
    assert list(read_facts(out)) == ["01", "02", "03", "04", "05", "06"]
    main([*command, "--count", "2"])  # a smaller count takes nothing away
    assert digests(out) == after


def test_a_failed_write_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, frames: np.ndarray, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(make_vss_module, "encode_video", stop)
        with pytest.raises(OSError, match="disk is full"):
            make_vss(tmp_path / "out", count=1, **SMALL)
    assert list((tmp_path / "out").rglob("*.mp4")) == []
    make_vss(tmp_path / "out", count=1, **SMALL)
    make_vss(tmp_path / "whole", count=1, **SMALL)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_other_arguments_are_refused_in_the_same_folder(tmp_path: Path) -> None:
    make_vss(tmp_path, count=1, **SMALL)
    before = digests(tmp_path)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed=1: .* was made with seed=0; give the same value or another folder"),
        ({"fps": 9}, "fps=9: .* was made with fps=8"),
        ({"split": "test"}, "split=test: .* was made with split=train"),
    ]
    for changed, message in changes:
        with pytest.raises(ValueError, match=message):
            make_vss(tmp_path, count=2, **(SMALL | changed))
    assert digests(tmp_path) == before
    facts = tmp_path / ".facts.json"
    for content in ("{", "[]", json.dumps({"settings": {}})):
        facts.write_text(content)
        with pytest.raises(ValueError, match=r"facts\.json: not valid"):
            make_vss(tmp_path, count=1, **SMALL)
    facts.unlink()
    with pytest.raises(ValueError, match=r"has samples but no \.facts\.json; give another"):
        make_vss(tmp_path, count=1, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count=0: must be 1 or more"),
        (["--count", "3", "--workers", "0"], "workers=0: must be 1 or more"),
        (["--count", "3", "--width", "63"], "width=63: must be even (yuv420p) and at least 32"),
        (["--count", "3", "--fps", "0"], "fps=0: must be 1 or more"),
        (["--count", "3", "--seconds", "0.2"], "seconds=0.2: 2 frames at fps=10; give 0.3 seconds"),
        (["--count", "3", "--split", "held_out"], "split=held_out: choose from train, test"),
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


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file; give a folder"):
        make_vss(tmp_path / "out", count=1, **SMALL)
