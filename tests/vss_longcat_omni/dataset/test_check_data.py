"""The check of a data set: every bad folder is listed, and what only warns does not fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from tests.vss_longcat_omni.support.media_samples import make_speech, make_video
from vss_longcat_omni.dataset.check import check_folder, check_transcripts, main
from vss_longcat_omni.dataset.folders import list_sample_folders
from vss_longcat_omni.dataset.special_tokens import build_byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all is well: 2 s of video, 1 s each of speech, 16 letters for 17 frames."""
    folder = tmp_path_factory.mktemp("good") / "01"
    folder.mkdir()
    make_video(folder / "input.mp4")
    make_speech(folder / "input.wav")
    make_speech(folder / "output.wav")
    (folder / "output.txt").write_text("it is a triangle\n")
    return folder


@pytest.fixture
def build(good: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the good folder to data/training/NAME."""

    def copy(name: str = "01", *, split: str = "training") -> Path:
        return Path(shutil.copytree(good, tmp_path / "data" / split / name))

    return copy


def test_a_good_folder_has_no_fault(build: Callable[..., Path]) -> None:
    (folder,) = list_sample_folders(build().parent)
    for decode in (True, False):
        report = check_folder(folder, decode=decode)
        check_transcripts([report], build_byte_tokenizer())
        assert (report.problems, report.warnings, report.notices) == ([], [], [])
        assert (report.video_seconds, report.input_seconds, report.output_seconds) == (2, 1, 1)
        assert report.transcript == "it is a triangle"


def spoil(name: str, folder: Path) -> None:
    """One fault each, by the name that the tests below give it."""
    data = (folder / "input.mp4").read_bytes()
    match name:
        case "gone":
            (folder / "output.wav").unlink()
        case "text":
            (folder / "input.wav").write_text("no audio")
        case "cut":
            (folder / "input.mp4").write_bytes(data[: len(data) // 2])
        case "no video":
            shutil.copy(folder / "input.wav", folder / "input.mp4")
        case "zero":
            soundfile.write(folder / "input.wav", np.zeros(0), 16000)
        case "short":
            make_speech(folder / "input.wav", 0.02)
        case "silent":
            make_speech(folder / "output.wav", level=1e-5)
        case "empty text":
            (folder / "output.txt").write_text("\n")
        case "latin text":
            (folder / "output.txt").write_bytes(b"caf\xe9")
        case "long text":
            (folder / "output.txt").write_text("a b c d e f g h i j k l m n o p q r")
        case "long speech":
            make_speech(folder / "input.wav", 121, rate=8000)
        case "cut mp3":
            make_speech(folder / "input.mp3", 8)
            sound = (folder / "input.mp3").read_bytes()
            (folder / "input.mp3").write_bytes(sound[: len(sound) // 2])
            (folder / "input.wav").unlink()


FAULTS = {
    "gone": "no output.wav or output.mp3; it holds output.txt instead",
    "text": "input.wav: not readable as wav, mp3 or flac",
    "cut": "input.mp4: cut off",
    "no video": "input.mp4: no video track",
    "zero": "input.wav: zero-length audio",
    "short": "input.wav: too short: 0.020 s",
    "silent": "output.wav: silent",
    "empty text": "output.txt: empty",
    "latin text": "output.txt: not UTF-8",
    "long text": "transcript: too long: at least 18 tokens and their end for 18 stream frames "
    "(1.00 s",
    "long speech": "input.wav: too long: 121.0 s, over 120 s",
    "cut mp3": "input.mp3: cut off after",
}


def test_every_bad_folder_is_listed(
    build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    build("00")
    for number, name in enumerate(FAULTS, start=1):
        spoil(name, build(f"{number:02d}"))
    place = build("99").parent
    assert main(["check", str(place.parent), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wanted = zip(range(1, len(FAULTS) + 1), FAULTS.values(), strict=True)
    starts = [f"{place / f'{number:02d}'}: {message}" for number, message in wanted]
    problems = [line for line in lines if "warning: " not in line]
    assert [p[: len(s)] for p, s in zip(problems, starts, strict=False)] == starts
    assert problems[len(starts)].startswith(f"{place}: 14 samples, 12 bad, 1 with warnings, ")
    warnings = [line for line in lines if "warning: " in line]
    assert len(warnings) == 1
    assert "11: warning: input.wav lasts 121.0 s, the video 2.0 s" in warnings[0]


def test_what_only_warns_does_not_fail(
    build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build()
    make_speech(folder / "input.wav", 13, level=1e-5)
    make_speech(folder / "output.wav", 40)
    shutil.copy(folder / "output.wav", folder / "output.mp3")
    assert main(["check", str(folder.parent), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "01: warning: input.wav: silent; input.wav lasts 13.0 s, the video 2.0 s; " in out
    assert "transcript: 0.4 characters a second of output.wav: is it what is said there?" in out
    assert "01: notice: output.wav is used, output.mp3 is not" in out
    assert "1 samples, 0 bad, 1 with warnings, 1 with a transcript; 0.00 h of video" in out


def test_a_tokenizer_counts_the_transcript_as_training_does(
    build: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = build().parent.parent  # 17 codec frames: 18 stream frames, for 17 letters and the end
    (build("02") / "output.txt").write_text("it is a triangle!")
    (build("03") / "output.txt").write_text("it is a triangle!!")
    command = ["check", str(data), "--workers", "1", "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "03: transcript: too long: 18 tokens and their end for 18 stream frames" in lines[0]
    assert main([*command[:-1], str(tmp_path / "none")]) == 2
    assert "none: no tokenizer there" in capsys.readouterr().err


def test_headers_alone_miss_what_decoding_finds(
    build: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build()
    spoil("cut mp3", folder)
    command = ["check", str(folder.parent), "--workers", "1"]
    assert main([*command, "--headers_only"]) == 0
    assert "not checked: whether all decodes" in capsys.readouterr().out
    assert main(command) == 1


def test_without_samples_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--split", "test"]):
        assert main(["check", str(tmp_path), *options]) == 2
        assert "error: No valid samples found for the split" in capsys.readouterr().err


@pytest.mark.dist
def test_the_command_with_two_processes(build: Callable[..., Path]) -> None:
    data = build("1").parent.parent
    build("2")
    (build("0", split="test") / "input.wav").write_text("no audio")
    command = [sys.executable, "-m", "vss_longcat_omni.dataset", "check", str(data)]
    done = subprocess.run(
        [*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{data / 'training'}: 2 samples, 0 bad, ")
    assert lines[1].startswith(f"{data / 'test' / '0'}: input.wav: not readable")
    assert lines[2].startswith(f"{data / 'test'}: 1 samples, 1 bad, ")
    assert "2/2" in done.stderr  # the progress bar
