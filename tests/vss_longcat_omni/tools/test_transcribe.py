"""Transcripts by a recognizer: made once for each sound, and taken where there is no output.txt."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.llama_omni.speech.test_recognizer import make_whisper
from vss_longcat_omni import train_ds
from vss_longcat_omni.dataset.folders import find_samples
from vss_longcat_omni.media.audio import load_audio, save_audio
from vss_longcat_omni.speech.recognizer import Recognizer
from vss_longcat_omni.tools.transcribe import find_all, main, transcribe

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.vss_longcat_omni.conftest import Ground

UNTOLD = ("01", "02", "03")  # whose output.txt is taken away


@pytest.fixture
def data(ground: Ground, tmp_path: Path) -> Path:
    for name in (*UNTOLD, "04"):
        shutil.copytree(ground.data / "training" / name, tmp_path / "data" / "training" / name)
    for name in UNTOLD:
        (tmp_path / "data" / "training" / name / "output.txt").unlink()
    return tmp_path / "data"


class Lengths:
    """Transcribes how long the sound is, silence as nothing; it dies after so many sounds."""

    def __init__(self, name: str = "lengths", *, dies_after: int = 99) -> None:
        self.recognizer = Recognizer(name, self.transcribe, {})
        self.lengths: list[int] = []
        self.dies_after = dies_after

    def transcribe(self, waveform: Tensor) -> str:
        if len(self.lengths) == self.dies_after:
            raise KeyboardInterrupt
        self.lengths.append(len(waveform))
        return f" {len(waveform)}\nsamples " if waveform.any() else "  "


def texts(cache: Path) -> list[str]:
    return sorted(path.read_text() for path in (cache / "transcripts").glob("*.txt"))


def test_each_sound_is_transcribed_once(data: Path, tmp_path: Path) -> None:
    """A copy of an answer is no other sound; a killed run continues; a sample's own text stays."""
    shutil.copytree(data / "training" / "01", data / "test" / "01")
    samples, cache = find_all(data), tmp_path / "cache"
    assert len(samples) == 5
    killed = Lengths(dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        transcribe(samples, killed.recognizer, cache)
    assert len(texts(cache)) == 2
    lengths = Lengths()
    report = transcribe(samples, lengths.recognizer, cache)
    assert len(lengths.lengths) == 1
    assert (report.num_own, report.num_there, report.num_written) == (1, 3, 1)
    lengths = [len(load_audio(s.output_audio)) for s in samples if s.transcript is None]
    assert texts(cache) == sorted(f"{length}\nsamples\n" for length in set(lengths))
    notes = [json.loads(p.read_text()) for p in (cache / "transcripts").glob("*.json")]
    assert {note["asr"] for note in notes} == {"lengths"}
    assert not list((cache / "transcripts").glob("*.partial"))
    better = Lengths("better lengths")
    assert transcribe(samples, better.recognizer, cache).num_written == 3


def test_answers_without_a_word_are_reported(data: Path, tmp_path: Path) -> None:
    folder = data / "training"
    save_audio(folder / "02" / "output.wav", torch.zeros(8000), sample_rate=16000)
    (folder / "03" / "output.wav").write_bytes(b"no speech")
    report = transcribe(find_samples(data), Lengths().recognizer, tmp_path / "cache")
    assert len(texts(tmp_path / "cache")) == 1
    silent, broken = report.problems
    assert silent == f"{folder / '02' / 'output.wav'}: lengths finds no word; write output.txt"
    assert str(folder / "03" / "output.wav") in broken


def test_training_takes_cached_transcripts(
    ground: Ground, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"deepspeed": "", "bf16": False, "data_dir": data, "prepare_only": True}
    options |= {"cache_dir": tmp_path / "cache"}
    argv = ground.argv(tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"sample 01: no output.txt beside output.wav") as found:
        train_ds.main(argv)
    command = f"python -m vss_longcat_omni.tools.transcribe {data / 'training'} "
    assert f"{command}--cache_dir {tmp_path / 'cache'} --asr whisper:" in str(found.value)
    assert "--transcripts none" in str(found.value)
    transcribe(find_samples(data), Lengths().recognizer, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        train_ds.main(argv)
        assert "3 of 4 transcripts are from the cache" in caplog.text
        caplog.clear()
        train_ds.main([*argv, "--transcripts", "none"])
    assert "transcripts are from the cache" not in caplog.text


def test_the_command_with_whisper(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = load_audio(data / "training" / "01" / "output.wav")
    torch.manual_seed(0)
    make_whisper(tmp_path / "whisper", {"red": clip})
    spec = f"whisper:{tmp_path / 'whisper'}"
    common = ["--cache_dir", str(tmp_path / "cache"), "--device", "cpu"]
    assert main([str(data / "training"), "--asr", spec, *common]) == 0
    assert "red\n" in texts(tmp_path / "cache")
    assert f"4 samples, 1 with a text of their own, 0 transcribed before, 3 now by {spec}" in (
        capsys.readouterr().out
    )


def test_mistakes_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--asr none: name the one"):
        main([str(data), "--asr", "none"])
    argv = [sys.executable, "-m", "vss_longcat_omni.tools.transcribe", str(tmp_path / "absent")]
    done = subprocess.run([*argv, "--asr", "pocketsphinx"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No valid samples found")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()
