"""Checks a dataset before training: every fault by line, exit codes, and what only warns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from llama_omni.dataset.check import check_units, main, scan_records
from llama_omni.dataset.records import Record, read_records
from llama_omni.tools.make_model import build_tokenizer

# Stays 50 frames after the upsampling of 2 tokens: an answer of one byte and <|eot_id|>.
ONE_BYTE = "4"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    def write(name: str, seconds: float) -> None:
        noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16000))
        soundfile.write(tmp_path / name, noise, 16000)

    write("ok.wav", 1.0)
    write("long.wav", 30.5)
    write("short.wav", 0.05)
    write("none.wav", 0.0)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio")
    write("whole.flac", 2.0)
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    write("whole.mp3", 8.0)
    data = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    return tmp_path


def item(speech: str = "ok.wav", answer: str = "Four.", **more: object) -> dict[str, object]:
    record = {"speech_instruction_path": speech, "text_instruction": "q", "text_response": answer}
    return {**record, **more}


def write(root: Path, *items: object) -> Path:
    path = root / "data.jsonl"
    lines = [i if isinstance(i, str) else json.dumps(i) for i in items]
    path.write_text("\n".join(lines) + "\n")
    return path


def scan(path: Path, **options: object) -> dict[int, str]:
    """Reasons by line of the records that were read well but are not usable."""
    records, bad = read_records(path, needs_units=None)
    assert bad == []
    found = scan_records(records, show_progress=False, **options)  # pyright: ignore
    return {b.line: ("warning: " if b.is_warning else "") + b.reason for b in found}


def test_each_audio_fault_by_line(root: Path) -> None:
    names = ["ok", "long", "short", "none", "empty", "text", "whole"]
    suffixes = {"whole": ".flac"}
    items = [item(name + suffixes.get(name, ".wav")) for name in names]
    path = write(root, *items, item(speech_response_path="text.wav"))
    for decode in (False, True):
        found = scan(path, decode=decode)
        assert sorted(found) == [2, 3, 4, 5, 6, 8]
        assert "long.wav: 30.5 s is too long, Whisper takes 30 s" in found[2]
        assert "short.wav: 0.05 s is too short" in found[3]
        assert "none.wav: zero-length" in found[4]
        assert "empty.wav: zero-length" in found[5]
        assert "text.wav: not readable" in found[6]
        assert "text.wav: not readable" in found[8]
    assert sorted(scan(path, stage=1)) == [2, 3, 4, 5, 6]  # stage 1 reads no answer's speech


def test_broken_downloads_are_found_by_decoding(root: Path) -> None:
    path = write(root, item("cut.flac"), item("cut.mp3"), item("whole.mp3"))
    assert scan(path) == {}
    found = scan(path, decode=True)
    assert sorted(found) == [1, 2]
    assert "cut.mp3: cut off after" in found[2]


def test_token_limit_counts_prompt_speech_and_answer(root: Path) -> None:
    tokenizer = build_tokenizer()
    path = write(root, item(answer="x"), item(answer="xy"))
    records, _ = read_records(path)
    from transformers import WhisperFeatureExtractor

    from llama_omni.data_utils import SpeechInstructionDataset

    for pad in (False, True):
        dataset = SpeechInstructionDataset(
            records,
            tokenizer,
            feature_extractor=WhisperFeatureExtractor(),
            pad_audio_to_30s=pad,
        )
        length = len(dataset[0].input_ids)
        found = scan(path, tokenizer=tokenizer, max_length=length, pad_audio_to_30s=pad)
        assert found == {2: f"{length + 1} tokens, over the limit of {length} (model_max_length)"}


@pytest.mark.parametrize(
    ("units", "frames", "expected"),
    [
        ([1, 2, 3], 3, None),
        ([1, 2, 3], 2, ("3 units need 3 frames, its text gives 2", False)),  # stretched: feasible
        ([1, 1, 2], 4, None),
        ([1, 1, 2], 3, ("3 units with 1 equal neighbors need 4 frames", True)),
        ([1, 1, 2], 2, ("3 units with 1 equal neighbors need 4 frames", True)),
        ([1, 10], 50, ("unit 10 is outside unit_vocab_size=10", True)),
    ],
)
def test_units_against_frames(
    units: list[int], frames: int, expected: tuple[str, bool] | None
) -> None:
    text, is_bad = check_units(units, frames, unit_vocab_size=10)
    if expected is None:
        assert (text, is_bad) == (None, False)
    else:
        assert text is not None
        assert expected[0] in text
        assert is_bad == expected[1]


def test_ctc_by_line_with_and_without_tokenizer(root: Path) -> None:
    distinct = list(range(51))  # for 2 tokens x 25 = 50 frames: one too many, no repeats
    repeats = [7] * 26  # 26 + 25 blanks between = 51 frames
    path = write(
        root,
        item(answer=ONE_BYTE, tgt_units=distinct[:50]),
        item(answer=ONE_BYTE, tgt_units=distinct),
        item(answer=ONE_BYTE, tgt_units=repeats),
        item(answer=ONE_BYTE, tgt_units=repeats[:25]),
    )
    for tokenizer in (None, build_tokenizer()):
        found = scan(path, tokenizer=tokenizer)
        assert sorted(found) == [2, 3]
        assert found[2].startswith("warning: CTC-infeasible: 51 units need 51 frames")
        assert found[3].startswith("CTC-infeasible: 26 units with 25 equal neighbors need 51")
    assert scan(path, stage=1) == {}
    assert scan(path, ctc_upsample_factor=26) == {}
    # A tokenizer that merges the letters into one token: fewer frames than the bound allows.
    path = write(root, item(answer="four", tgt_units=list(range(60))))
    assert scan(path) == {}
    merged = build_tokenizer(["four"] * 50, vocab_size=400)
    assert sorted(scan(path, tokenizer=merged)) == [1]


def test_command_lists_all_and_fails(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        root,
        item(),
        "{",
        item(answer=""),
        item("gone.wav"),
        item("text.wav"),
        item("long.wav"),
        item(answer=ONE_BYTE, tgt_units=list(range(51))),
        item(speech_response_path="gone.wav"),
        item(tgt_units="1000"),
    )
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:8]] == [f"{path}:{n}" for n in range(2, 10)]
    for line, part in zip(
        lines,
        ("not valid JSON", "empty", "missing", "not readable", "too long", "CTC-inf", "missing",
         "outside unit_vocab_size"),
        strict=False,
    ):  # fmt: skip
        assert part in line
    assert lines[8] == f"{path}: 9 records, 8 bad"


def test_command_exit_codes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(write(root, item()))]) == 0
    assert main(["check", str(root), "--stage", "2"]) == 1  # neither units nor answer's speech
    write(root, item(answer=ONE_BYTE, tgt_units=list(range(51))))
    assert main(["check", str(root)]) == 1
    capsys.readouterr()
    assert main(["check", str(root), "--allow_stretch"]) == 0
    assert "data.jsonl:1: warning: CTC-infeasible" in capsys.readouterr().out
    assert main(["check", str(root), "--stage", "1"]) == 0
    assert main(["check", str(root / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["check", str(root), "--tokenizer", str(root / "none")]) == 2


def test_command_with_a_tokenizer(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tokenizer().save_pretrained(root / "tokenizer")
    path = write(root, item(), item(answer="x" * 3000))
    assert main(["check", str(path), "--tokenizer", str(root / "tokenizer")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "tokens, over the limit of 2048" in lines[0]
    assert lines[0].startswith(f"{path}:2: ")
    assert not any("--tokenizer" in line for line in lines)


def test_module_command(root: Path) -> None:
    path = write(root, item(), item("gone.wav"))
    done = subprocess.run(
        [sys.executable, "-m", "llama_omni.data_utils", "check", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"{path}:2: missing audio file" in done.stdout


def test_many_records_keep_their_order(root: Path) -> None:
    path = write(root, *(item("long.wav" if i % 70 == 0 else "ok.wav") for i in range(1, 300)))
    assert sorted(scan(path)) == [70, 140, 210, 280]
    assert scan_records([], show_progress=False) == []
    assert isinstance(read_records(path)[0][0], Record)
