"""Runs the documented commands, and reads the messages of wrong inputs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from tests.llama_omni.support.tiny import (
    COMMON,
    FOLDER,
    NUM_RECORDS,
    Tiny,
    arguments,
    copy_data,
    launch,
    losses,
    make_kmeans,
    train,
    weights,
    write_jsonl,
)

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

# What turns the shipped configs, made for 8B, into a run of the tiny models.
TINY_OPTIONS = arguments(
    COMMON | {"max_steps": 2, "global_batch_size": 8, "save_strategy": "epoch"}
)


def run_script(*argv: Any) -> subprocess.CompletedProcess[str]:
    return launch(["bash", *map(str, argv)], env={"PYTHON": sys.executable})


def test_both_stages_as_documented(tiny: Tiny, tmp_path: Path) -> None:
    """They run inside llama_omni/; the configs stay as they are; stage 2 finds stage 1's result."""
    configs = {path: path.read_bytes() for path in (FOLDER / "configs").iterdir()}
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_script(
        "scripts/run_stage1.sh", "configs/stage1_config.json", tiny.data, one, *TINY_OPTIONS,
        "--model_name_or_path", tiny.llama, "--speech_encoder", tiny.whisper,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "global batch 8 = 4 a device x 1 device(s) x 2 accumulation step(s)" in done.stderr
    assert sorted(path.name for path in (one / "final_model").iterdir()) >= ["config.json"]
    assert (one / "tensorboard").is_dir()  # the config's report_to
    assert (one / "checkpoint-2" / "trainer_state.json").is_file()
    done = run_script(
        "scripts/run_stage2.sh", "configs/stage2_config.json", tiny.data, one / "final_model",
        tiny.kmeans, two, *TINY_OPTIONS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "speech_generator" in done.stderr
    assert all(math.isfinite(loss) for loss in (*losses(one), *losses(two)))
    before, after = weights(one / "final_model"), weights(two / "final_model")
    assert all(value.equal(after[name]) for name, value in before.items())  # frozen in stage 2
    assert any(name.startswith("speech_generator.") for name in after)
    assert {path: path.read_bytes() for path in configs} == configs


@pytest.mark.parametrize("stage", [1, 2])
def test_usage(stage: int) -> None:
    done = run_script(f"scripts/run_stage{stage}.sh", "config.json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: bash scripts/run_stage{stage}.sh CONFIG DATA ")


def test_a_mistake_comes_out_of_the_script(tiny: Tiny, tmp_path: Path) -> None:
    done = run_script(
        "scripts/run_stage1.sh", "configs/stage1_config.json", tiny.data, tmp_path / "out",
        "--learning_rats", "1",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the command line: unknown key 'learning_rats'. Did you mean 'learning_rate'?"
    ]


def error_of(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the one message of a run that must fail."""
    capsys.readouterr()
    assert train(argv) in (1, 2)
    output = capsys.readouterr().err
    assert "Traceback" not in output
    assert not (out / "final_model").exists()
    (message,) = (line for line in output.splitlines() if line.startswith("error: "))
    return message


def test_missing_data(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = tiny.stage1(tmp_path, data_path="no/such/data")
    message = error_of(argv, tmp_path, capsys)
    assert "data_path='no/such/data': no such file or folder" in message
    (tmp_path / "empty").mkdir()
    message = error_of(tiny.stage1(tmp_path, data_path=tmp_path / "empty"), tmp_path, capsys)
    assert str(tmp_path / "empty") in message


def test_wrong_json(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = copy_data(tiny, tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", records)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    message = error_of(tiny.stage1(tmp_path / "out", data_path=data), tmp_path, capsys)
    assert f"{data}:2" in message
    assert "JSON" in message
    data = tmp_path / "data.json"
    data.write_text("[{]")
    message = error_of(tiny.stage1(tmp_path / "out", data_path=data), tmp_path, capsys)
    assert str(data) in message


def test_zero_length_audio(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named and stopped at; or skipped and counted."""
    records = copy_data(tiny, tmp_path)
    soundfile.write(tmp_path / "q2.wav", np.zeros(0, dtype=np.float32), 16000)
    (tmp_path / "q5.wav").unlink()
    data = write_jsonl(tmp_path / "data.jsonl", records)
    message = error_of(tiny.stage1(tmp_path / "out", data_path=data), tmp_path, capsys)
    assert f"{data}: 2 bad record(s)" in message
    assert "data.jsonl:3" in message
    assert "--skip_bad_records" in message
    out = tmp_path / "skipped"
    assert train(tiny.stage1(out, data_path=data, skip_bad_records=True, num_train_epochs=1)) == 0
    assert len(losses(out)) == math.ceil((NUM_RECORDS - 2) / 4)


def test_stage_2_without_stage_1(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "stage1" / "final_model"
    message = error_of(tiny.stage2(tmp_path, stage1_model_path=model), tmp_path, capsys)
    assert "Run stage 1 first" in message
    message = error_of(tiny.stage2(tmp_path, stage1_model_path=tiny.llama), tmp_path, capsys)
    assert "holds no Whisper encoder" in message


def test_wrong_units(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kmeans = make_kmeans(tmp_path / "kmeans.safetensors", num_units=30)
    argv = tiny.stage2(tmp_path / "out", kmeans_model_path=kmeans)
    message = error_of(argv, tmp_path, capsys)
    assert "unit_vocab_size=40" in message
    assert "30 units" in message
    records = copy_data(tiny, tmp_path)
    records[4]["tgt_units"] = "3 40"  # ids end at 39; no speech to extract them from again
    data = write_jsonl(tmp_path / "data.jsonl", records)
    message = error_of(tiny.stage2(tmp_path / "out", data_path=data), tmp_path, capsys)
    assert "data.jsonl:5" in message
    assert "40" in message


def test_checkpoints_of_another_shape(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(tiny.stage1(tmp_path, mel_size=128), tmp_path, capsys)
    assert "mel_size=128" in message
    assert "Set mel_size to 80" in message
    message = error_of(tiny.stage2(tmp_path, speech_encoder_ds_rate=4), tmp_path, capsys)
    assert "speech_encoder_ds_rate=4" in message
    assert "trained with 5" in message
    argv = tiny.stage1(
        tmp_path, speech_encoder_ds_rate=4, pretrain_speech_projector=tiny.stage1_model
    )
    message = error_of(argv, tmp_path, capsys)
    assert "speech_projector.linear1.weight has shape (2048, 640)" in message
    other = tmp_path / "other"
    shutil.copytree(tiny.llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    message = error_of(tiny.stage1(tmp_path, model_name_or_path=other), tmp_path, capsys)
    assert "built on a Llama" in message
