"""generate.py as a command: files it writes, checkpoints it takes, and its errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_omni.generate import load_omni_model, main
from llama_omni.model.loading import CheckpointReader
from llama_omni.speech.audio import audio_duration, load_audio, save_audio
from tests.llama_omni.support.omni_checkpoint import NUM_UNITS, make_omni_checkpoint
from tests.llama_omni.support.tiny import Tiny, launch, make_audio, make_kmeans


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a model with its k-means beside it, as stage 2 leaves it."""
    folder = make_omni_checkpoint(tmp_path_factory.mktemp("omni") / "final_model")
    make_kmeans(folder / "kmeans.safetensors", num_units=NUM_UNITS)
    return folder


@pytest.fixture
def question(tmp_path: Path) -> Path:
    make_audio(tmp_path / "question.wav", seconds=0.7, seed=1)
    return tmp_path / "question.wav"


def generate(model: Path, *questions: Path, out: Path, options: str = "") -> int:
    argv = [str(model), *map(str, questions), "--output_dir", str(out), "--device", "cpu"]
    return main([*argv, "--max_new_tokens", "12", *options.split()])


def read_report(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_wav_in_text_and_wav_out(
    model: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_audio(tmp_path / "other.flac", seconds=0.5, seed=2)
    assert generate(model, question, tmp_path / "other.flac", out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for name in ("question", "other"):
        wav = tmp_path / "out" / f"{name}_answer.wav"
        report = read_report(wav.with_suffix(".json"))
        assert audio_duration(wav) > 0.1
        assert report["text"]
        assert isinstance(report["units"], list)
        assert str(report["text"]) in printed
        assert str(wav) in printed


def test_streaming_writes_the_same_speech(
    model: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, question, out=tmp_path / "whole") == 0
    options = "--streaming --chunk_size 4"
    assert generate(model, question, out=tmp_path / "streamed", options=options) == 0
    assert "first audio after" in capsys.readouterr().out
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    name = "question_answer.wav"
    assert torch.equal(load_audio(whole / name), load_audio(streamed / name))
    found = [read_report(folder / "question_answer.json") for folder in (whole, streamed)]
    assert isinstance(found[1].pop("first_audio_seconds"), float)
    assert found[0].pop("first_audio_seconds") is None
    assert found[0] == found[1]


def test_a_stage_1_model_answers_in_text(
    tiny: Tiny, question: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate(tiny.stage1_model, question, out=tmp_path / "out") == 0
    assert "no speech generator" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["question_answer.json"]
    assert read_report(tmp_path / "out" / "question_answer.json")["units"] is None


@pytest.mark.parametrize("options", ["--streaming", "--kmeans {kmeans}", "--vocoder {kmeans}"])
def test_a_stage_1_model_cannot_speak(
    tiny: Tiny, question: Path, tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options.format(kmeans=tiny.kmeans)
    assert generate(tiny.stage1_model, question, out=tmp_path, options=options) == 1
    assert "no speech generator" in capsys.readouterr().err


def test_bfloat16_and_text_only(model: Path, question: Path, tmp_path: Path) -> None:
    options = "--dtype bfloat16 --text_only"
    assert generate(model, question, out=tmp_path / "out", options=options) == 0
    assert not list((tmp_path / "out").glob("*.wav"))
    omni = load_omni_model(model, device="cpu", dtype=torch.bfloat16)
    assert omni.model.lm_head.weight.dtype == torch.bfloat16
    assert omni.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_questions_are_checked_before_the_model_loads(
    tmp_path: Path, question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, empty, text = (tmp_path / name for name in ("long.wav", "empty.wav", "text.wav"))
    save_audio(long, torch.zeros(31 * 16000), sample_rate=16000)
    save_audio(empty, torch.zeros(0), sample_rate=16000)
    text.write_text("not audio")
    nowhere = tmp_path / "no_model"
    for path, message in {
        tmp_path / "absent.wav": "no such audio file",
        long: "31.0 s of speech",
        empty: "0.0 s of speech",
        text: "not readable",
    }.items():
        assert generate(nowhere, path, out=tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert str(path) in error
        assert message in error
    (tmp_path / "again").mkdir()
    same_name = tmp_path / "again" / "question.wav"
    save_audio(same_name, torch.ones(8000), sample_rate=16000)
    assert generate(nowhere, question, same_name, out=tmp_path / "out") == 1
    assert "would overwrite" in capsys.readouterr().err


def test_names_what_the_voice_lacks(
    question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_omni_checkpoint(tmp_path / "model")
    wrong = make_kmeans(tmp_path / "wrong.safetensors", num_units=NUM_UNITS + 1)
    for options, message in {
        "": "no voice to speak with",
        f"--kmeans {tmp_path / 'absent.safetensors'}": "absent.safetensors",
        f"--vocoder {tmp_path / 'absent'}": "absent",
        f"--kmeans {wrong}": f"{NUM_UNITS + 1} units",
    }.items():
        assert generate(model, question, out=tmp_path / "out", options=options) == 1
        assert message in capsys.readouterr().err


def test_errors_of_what_is_no_whole_omni_model(
    tiny: Tiny, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny.llama, question, out=tmp_path / "out") == 1
    assert "without a speech encoder" in capsys.readouterr().err
    for part in ("speech_projector.linear1.weight", "layers.1.mlp.up_proj.weight"):
        folder = make_omni_checkpoint(tmp_path / part)
        drop_weights(folder, part)
        assert generate(folder, question, out=tmp_path / "out", options="--text_only") == 1
        error = capsys.readouterr().err
        assert part in error
        assert "missing" in error


def drop_weights(folder: Path, part: str) -> None:
    for path in folder.glob("*.safetensors"):
        kept = {name: value for name, value in load_file(path).items() if part not in name}
        save_file(kept, path)


def test_takes_a_released_checkpoint(model: Path, question: Path, tmp_path: Path) -> None:
    """A released one has no feature extractor, no encoder sizes and none of our own config keys."""
    released = make_omni_checkpoint(tmp_path / "released", pad_audio_to_30s=True)
    config = json.loads((released / "config.json").read_text())
    for key in ("mel_size", "speech_encoder_layers", "pad_audio_to_30s"):
        del config[key]
    (released / "config.json").write_text(json.dumps(config))
    (released / "preprocessor_config.json").unlink()
    options = f"--kmeans {model / 'kmeans.safetensors'}"
    assert generate(released, question, out=tmp_path / "out", options=options) == 0
    ours = make_omni_checkpoint(tmp_path / "ours", pad_audio_to_30s=True)
    assert generate(ours, question, out=tmp_path / "expected", options=options) == 0
    name = "question_answer.json"
    assert read_report(tmp_path / "out" / name) == read_report(tmp_path / "expected" / name)


def test_weights_are_those_of_the_files(model: Path) -> None:
    omni = load_omni_model(model, device="cpu", dtype=torch.float32)
    reader = CheckpointReader(model)
    for name, weight in omni.model.named_parameters():
        stored = reader.rows(name, 0, len(weight))
        assert torch.equal(weight, stored), name
    assert not omni.model.training


def test_runs_as_a_script_in_its_folder(model: Path, question: Path, tmp_path: Path) -> None:
    """An evaluate.py is beside it, which is also the name of a package that others import."""
    command = [sys.executable, "generate.py", str(model), str(question)]
    done = launch([*command, "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "8"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "question_answer.wav").is_file()
