"""What commit c64db93 wrote still loads and resumes: checkpoints, a unit cache, a final model.

tests/reference/c64db93/llama_omni/written.tar.xz is a run of stage 2 of six steps, packed:

    data/  kmeans.safetensors  units/            records, and the units of their answers
    stage1_model/                                what it began from (most weights are zeros)
    out/checkpoint-3  metrics.jsonl  final_model/
    out_8bit/checkpoint-3  metrics.jsonl         the same with 8bit moments and bf16 weights
    answer.json                                  what final_model answered to data/q0.wav
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_omni.generate import load_omni_model
from llama_omni.inference.answering import answer
from llama_omni.speech.audio import load_audio
from llama_omni.training.optimizer import LowPrecisionAdamW
from llama_omni.units import main as units_main
from tests.llama_omni.support.tiny import (
    Tiny,
    arguments,
    assert_same_weights,
    metrics,
    train,
    weights,
)

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "tests" / "reference" / "c64db93" / "llama_omni"
RESUMED_STEPS = [4, 5, 6]


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Unpacks the folder. A unit cache names clips by absolute path, size and time of change."""
    with tarfile.open(OLDER / "written.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (shard,) = (tmp_path / "units").glob("rank*.jsonl")
    entries = [json.loads(line) for line in shard.read_text().splitlines()]
    for entry in entries:
        path = (tmp_path / "data" / Path(entry["path"]).name).resolve()
        os.utime(path, ns=(entry["mtime_ns"], entry["mtime_ns"]))
        entry["path"] = str(path)
    shard.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def resume(older: Path, name: str, **options: Any) -> Path:
    """Resumes the older run by its own options from its step 3; returns the new OUT."""
    out = older / f"{name}_again"
    given: dict[str, Any] = {
        "stage": 2, "data_path": older / "data" / "data.jsonl", "output_dir": out,
        "stage1_model_path": older / "stage1_model", "unit_cache_dir": older / "units",
        "kmeans_model_path": older / "kmeans.safetensors", "unit_vocab_size": 8,
        "mel_size": 80, "speech_encoder_hidden_size": 64, "speech_encoder_ds_rate": 1,
        "ctc_decoder_config": "(1,8,2,16)", "ctc_upsample_factor": 4, "bf16": False,
        "freeze_backbone": True, "tune_speech_generator_only": True, "learning_rate": 3e-3,
        "adam_epsilon": 1e-4, "per_device_train_batch_size": 2, "max_steps": 6,
        "logging_steps": 1, "evaluation_strategy": "no", "save_strategy": "no",
        "dataloader_num_workers": 0, "resume_from_checkpoint": older / name / "checkpoint-3",
    }  # fmt: skip
    assert train(arguments(given | options)) == 0
    return out


def assert_goes_on(older: Path, again: Path, *, rel: float) -> None:
    """The steps after the checkpoint, with all that was logged of them."""
    wanted = [line for line in metrics(older) if line["step"] in RESUMED_STEPS]
    found = metrics(again)
    assert [line["step"] for line in found] == RESUMED_STEPS
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def test_a_checkpoint_resumes_as_the_run_went_on(older: Path) -> None:
    shards = {path.name: path.read_bytes() for path in (older / "units").iterdir()}
    again = resume(older, "out")
    assert_goes_on(older / "out", again, rel=1e-4)
    ours, theirs = weights(again / "final_model"), weights(older / "out" / "final_model")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    # No clip was done again: a process writes what it makes to a shard of its own.
    assert {path.name: path.read_bytes() for path in (older / "units").iterdir()} == shards


def test_8bit_moments_resume(older: Path) -> None:
    again = resume(older, "out_8bit", bf16=True, optimizer_precision="8bit")
    assert_goes_on(older / "out_8bit", again, rel=0.03)  # bf16: processors round differently


def test_8bit_moments_of_convolutions_resume_bitwise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained speech encoder's were in bf16 then, and stay so."""
    create = LowPrecisionAdamW._init_state

    def create_as_then(self: Any, param: torch.Tensor, state: dict[str, Any]) -> None:
        monkeypatch.setattr(self, "eight_bit", param.ndim == 2)
        create(self, param, state)
        monkeypatch.setattr(self, "eight_bit", True)

    options: dict[str, Any] = {
        "bf16": True, "optimizer_precision": "8bit", "tune_speech_encoder": True, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": None,
    }  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(LowPrecisionAdamW, "_init_state", create_as_then)
        assert train(tiny.stage1(whole, **options)) == 0
    checkpoint = whole / "checkpoint-2"
    assert train(tiny.stage1(again, resume_from_checkpoint=checkpoint, **options)) == 0
    assert metrics(again) == metrics(whole)[2:]
    assert_same_weights(again / "final_model", whole / "final_model")


def test_units_are_not_extracted_again(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kmeans, cache = older / "kmeans.safetensors", older / "units"
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    argv = ["extract", older / "data" / "data.jsonl", "--kmeans_model_path", kmeans]
    units_main([str(argument) for argument in [*argv, "--cache_dir", cache, "--device", "cpu"]])
    assert capsys.readouterr().out.startswith("4 clips, ")
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_a_final_model_answers_as_before(older: Path) -> None:
    wanted = json.loads((older / "answer.json").read_text())
    folder = older / "out" / "final_model"
    assert (folder / "kmeans.safetensors").is_file()
    omni = load_omni_model(folder, device="cpu", dtype=torch.float32)
    reply = answer(omni, load_audio(older / "data" / "q0.wav"), max_new_tokens=8)
    assert {"text": reply.text, "units": reply.units} == wanted
    assert reply.units
