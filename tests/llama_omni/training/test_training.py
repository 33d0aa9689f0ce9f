"""Training in one process: it learns, resumes exactly, divides globally, and stops when it must."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from llama_omni.training.checkpoint import finished_checkpoints
from tests.llama_omni.support.tiny import (
    FOLDER,
    Tiny,
    assert_same_weights,
    copy_data,
    launch_env,
    losses,
    metrics,
    train,
    write_jsonl,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAGES = pytest.mark.parametrize("stage", [1, 2])


def test_both_stages_overfit_one_batch(tiny: Tiny, tmp_path: Path) -> None:
    """Stage 2 on stage 1's result. A model deaf to speech stays at 0.1 a token."""
    lines = tiny.data.read_text().splitlines(keepends=True)
    (tmp_path / "four.jsonl").write_text("".join(lines[:4]))
    for path in tiny.root.glob("*.wav"):
        (tmp_path / path.name).symlink_to(path)
    options: dict[str, Any] = {"data_path": tmp_path / "four.jsonl", "learning_rate": 2e-3}
    options["gradient_checkpointing"] = False
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tiny.stage1(one, max_steps=70, speech_projector_lr=5e-3, **options)) == 0
    model = one / "final_model"
    # Some seeds end with two units in an answer's first state, whose frames are all alike: 0.1.
    options |= {"ctc_decoder_config": "(2,128,4,256)", "seed": 1}
    assert train(tiny.stage2(two, max_steps=80, stage1_model_path=model, **options)) == 0
    for out in (one, two):
        assert losses(out)[0] > 4
        assert losses(out)[-1] < 0.05


@STAGES
def test_six_steps_equal_three_and_three_resumed(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    """Bitwise: weights, and metrics of every step. LoRA's dropout draws random numbers."""
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options["validation_data_path"] = tiny.data
    options["evaluation_strategy"] = "steps"
    options["eval_steps"] = 2
    if stage == 1:
        options |= {"lora_enable": True, "lora_dropout": 0.2, "lora_r": 4}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(tiny.stage(stage, whole, **options)) == 0
    checkpoint = whole / "checkpoint-3"
    assert train(tiny.stage(stage, resumed, resume_from_checkpoint=checkpoint, **options)) == 0
    assert_same_weights(whole / "final_model", resumed / "final_model")
    after = [line for line in metrics(whole) if line["step"] > 3]
    assert len(after) == 5  # steps 4, 5, 6 and the evaluations after 4 and 6
    assert metrics(resumed) == after
    assert all("eval/loss" in line for line in after[1::2][:1])


@STAGES
def test_accumulation_equals_one_large_batch(tiny: Tiny, tmp_path: Path, stage: int) -> None:
    """Each micro-batch has another number of targets; the loss is divided by the global count."""
    shapes = {"large": (8, 1), "small": (1, 8)}
    for name, (size, accum) in shapes.items():
        options: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": accum}
        options["adam_epsilon"] = 1e-3  # or Adam makes large steps of rounding errors
        argv = tiny.stage(stage, tmp_path / name, per_device_train_batch_size=size, **options)
        assert train(argv) == 0
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), abs=1e-5)
    assert_same_weights(
        tmp_path / "small" / "final_model", tmp_path / "large" / "final_model", atol=1e-6
    )


def test_evaluation_is_the_mean_over_the_whole_set(tiny: Tiny, tmp_path: Path) -> None:
    """A vanishing learning rate leaves the model as it is: eval and train losses then agree."""
    options: dict[str, Any] = {"validation_data_path": tiny.data, "evaluation_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-12, "max_steps": 1}
    for size in (3, 8):  # 3: the last evaluation batch is not full
        out = tmp_path / str(size)
        argv = tiny.stage1(out, per_device_eval_batch_size=size, **options)
        assert train(argv) == 0
        first, second = metrics(out)
        assert second["eval/loss"] == pytest.approx(first["train/loss"], abs=1e-5)


def test_a_step_of_zero_losses_stops_the_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ctc_infeasible=drop and one frame a token: no answer has a path, CTC zeroes them all."""
    records = copy_data(tiny, tmp_path)
    for record in records:
        record["tgt_units"] = " ".join(str(i % 7) for i in range(300))
    data = write_jsonl(tmp_path / "long.jsonl", records)
    out = tmp_path / "out"
    argv = tiny.stage2(out, data_path=data, max_steps=1, ctc_infeasible="drop")
    assert train(argv) == 1
    assert "exactly zero" in capsys.readouterr().err
    assert not (out / "final_model").exists()
    # Stretched to as many frames as units, the same data teaches.
    argv = tiny.stage2(out, data_path=data, max_steps=1)
    assert train(argv) == 0
    (line,) = metrics(out)
    assert line["train/stretched"] == 4  # a micro-batch
    assert line["train/loss"] > 0


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.long)])
def test_exploding_run_stops_before_the_step(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    argv = tiny.stage(
        stage, tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_steps=9,
        warmup_ratio=0.0, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert train(argv) == 1
    error = capsys.readouterr().err
    assert "nothing was stepped" in error
    assert "Traceback" not in error
    assert not (tmp_path / "final_model").exists()


def test_kept_and_planted_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    """save_total_limit keeps the newest; half-written folders are never picked."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    assert train(tiny.stage1(tmp_path, max_steps=4, **options)) == 0
    assert [p.name for p in finished_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    for name in ("checkpoint-9.partial", "checkpoint-8"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "checkpoint-9.partial" / "trainer_state.json").write_text('{"global_step": 9}')
    argv = tiny.stage1(tmp_path, max_steps=5, resume_from_checkpoint="latest", **options)
    assert train(argv) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_resuming_from_what_is_no_checkpoint(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-8").mkdir()
    folder = tmp_path / "checkpoint-8"
    assert train(tiny.stage1(tmp_path, max_steps=1, resume_from_checkpoint=folder)) == 1
    assert "not a finished checkpoint" in capsys.readouterr().err


def test_resuming_another_trainable_set_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    assert train(tiny.stage1(tmp_path, max_steps=1, tune_speech_projector=True, **options)) == 0
    argv = tiny.stage1(tmp_path, max_steps=2, resume_from_checkpoint="latest", **options)
    assert train(argv) == 1
    assert "does not fit" in capsys.readouterr().err


def test_tensorboard_is_written_and_wandb_is_explained(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tiny.stage1(tmp_path / "a", max_steps=1, report_to="tensorboard")) == 0
    (file,) = (tmp_path / "a" / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as when it is not installed
    assert train(tiny.stage1(tmp_path / "b", max_steps=1, report_to="wandb")) == 1
    error = capsys.readouterr().err
    assert "extra `wandb`" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("precision", ["bf16_stochastic", "8bit"])
def test_low_precision_trains_and_resumes_bitwise(
    tiny: Tiny, tmp_path: Path, precision: str
) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options |= {"bf16": True, "optimizer_precision": precision, "tune_speech_encoder": True}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(tiny.stage1(whole, **options)) == 0
    checkpoint = whole / "checkpoint-3"
    assert train(tiny.stage1(resumed, resume_from_checkpoint=checkpoint, **options)) == 0
    assert losses(whole)[-1] < losses(whole)[0] - 0.3
    assert_same_weights(whole / "final_model", resumed / "final_model")


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train.py", *argv],
        cwd=FOLDER,
        env=launch_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(is_there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not is_there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def last_saved(out: Path) -> int:
    """Returns the step of the newest checkpoint by names alone: old ones are removed meanwhile."""
    names = [path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def kill_at_random(tiny: Tiny, out: Path, *, rounds: int, seed: int) -> None:
    """Kills a run that saves at every step, resumes it, kills it again; then lets it end."""
    draw = random.Random(seed)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 100000}
    options["resume_from_checkpoint"] = "latest"
    reached = 0
    for _ in range(rounds):
        process = start(tiny.stage1(out, **options))
        wait_for(lambda before=reached: last_saved(out) > before, process)
        time.sleep(draw.random())
        process.kill()
        process.communicate()
        reached = json.loads((finished_checkpoints(out)[-1] / "trainer_state.json").read_text())[
            "global_step"
        ]
    assert train(tiny.stage1(out, **options | {"max_steps": reached + 2})) == 0
    assert [line["step"] for line in metrics(out)][-2:] == [reached + 1, reached + 2]


def test_kill_leaves_the_last_good_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    kill_at_random(tiny, tmp_path, rounds=1, seed=os.getpid())


@pytest.mark.long
def test_many_kills_leave_the_last_good_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    kill_at_random(tiny, tmp_path, rounds=12, seed=os.getpid())


def test_sigterm_saves_and_exits(tiny: Tiny, tmp_path: Path) -> None:
    process = start(tiny.stage1(tmp_path, max_steps=100000, dataloader_num_workers=1))
    wait_for((tmp_path / "metrics.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's worker too, as SLURM does
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    (checkpoint,) = finished_checkpoints(tmp_path)
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"stopped by a signal after step {step}" in error
    argv = tiny.stage1(tmp_path, max_steps=step + 1, resume_from_checkpoint="latest")
    assert train(argv) == 0
    assert metrics(tmp_path)[-1]["step"] == step + 1
