"""Several processes over gloo, started by torchrun, accelerate and deepspeed: equal to one."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from llama_omni.training.checkpoint import finished_checkpoints
from tests.llama_omni.support.tiny import (
    Tiny,
    assert_same_weights,
    copy_data,
    launch,
    losses,
    metrics,
    reserved_port,
    train,
    write_jsonl,
)

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Four steps over 8 records in global batches of 8; a checkpoint after the second.
SCHEDULE: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "adam_epsilon": 1e-3,  # or Adam makes large steps of rounding errors
}
ONE: dict[str, Any] = {"per_device_train_batch_size": 8}
TWO: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
    reason="DeepSpeed builds an operation at first use, and there is no C++ compiler",
)
LAUNCH_SECONDS = 400  # of a busy machine that compiles DeepSpeed's ops as well


@pytest.fixture(scope="module")
def one(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """OUT of the single-process run of each stage."""
    outs = {stage: tmp_path_factory.mktemp(f"one{stage}") for stage in (1, 2)}
    for stage, out in outs.items():
        assert train(tiny.stage(stage, out, **SCHEDULE | ONE)) == 0
    return outs


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the folder of all runs of two processes, by one pair of them; see several_runs.py."""
    folder = tmp_path_factory.mktemp("two")
    runs: list[tuple[list[str], int]] = []

    def add(name: str, stage: int, *, code: int = 0, **options: Any) -> None:
        argv = tiny.stage(stage, folder / name, **SCHEDULE | TWO | options)
        runs.append((argv, code))

    for stage in (1, 2):
        for kind in ("ddp", "fsdp2"):
            add(f"{kind}-{stage}", stage, parallel=kind)
    checkpoint = folder / "fsdp2-1" / "checkpoint-2"
    add("fsdp2-1-resumed", 1, parallel="fsdp2", resume_from_checkpoint=checkpoint)
    low: dict[str, Any] = {"parallel": "fsdp2", "bf16": True, "optimizer_precision": "8bit"}
    add("8bit", 1, **low)
    add("8bit-resumed", 1, resume_from_checkpoint=folder / "8bit" / "checkpoint-2", **low)
    absurd = {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0.0}
    add("nan", 1, code=1, parallel="ddp", **absurd | {"save_steps": 1})
    listing = folder / "runs.json"
    listing.write_text(json.dumps([{"argv": argv, "expect": code} for argv, code in runs]))
    command = [*TORCHRUN, "-m", "tests.llama_omni.support.several_runs", str(listing)]
    done = launch(command, cwd=ROOT, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stderr[-5000:]
    (folder / "log").write_text(done.stderr)
    return folder


def assert_equal_runs(out: Path, one_out: Path, *, loss: float, weight: float) -> None:
    assert losses(out) == pytest.approx(losses(one_out)[-len(losses(out)) :], abs=loss)
    assert_same_weights(out / "final_model", one_out / "final_model", atol=weight)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(one: dict[int, Path], two: Path, kind: str, stage: int) -> None:
    assert len(losses(two / f"{kind}-{stage}")) == 4
    assert_equal_runs(two / f"{kind}-{stage}", one[stage], loss=1e-5, weight=1e-6)


@pytest.mark.parametrize("name", ["fsdp2-1", "8bit"])
def test_sharded_states_resume_bitwise(two: Path, name: str) -> None:
    """Moments in float32, and as float8 with their scales."""
    assert losses(two / f"{name}-resumed") == losses(two / name)[2:]
    assert_same_weights(two / f"{name}-resumed" / "final_model", two / name / "final_model")


def test_what_two_processes_saved_one_goes_on_with(
    tiny: Tiny, one: dict[int, Path], two: Path, tmp_path: Path
) -> None:
    options = SCHEDULE | ONE | {"parallel": "fsdp2"}
    checkpoint = two / "fsdp2-1" / "checkpoint-2"
    assert train(tiny.stage1(tmp_path, resume_from_checkpoint=checkpoint, **options)) == 0
    assert len(losses(tmp_path)) == 2
    assert_equal_runs(tmp_path, one[1], loss=1e-5, weight=1e-6)


def test_nan_stops_both_processes_before_the_step(two: Path) -> None:
    """An absurd learning rate: what was saved is what was finite, and nobody hangs."""
    assert (two / "log").read_text().count("nothing was stepped") == 2
    assert not (two / "nan" / "final_model").exists()
    last_logged = metrics(two / "nan")[-1]
    assert math.isfinite(last_logged["train/loss"])
    saved = finished_checkpoints(two / "nan")[-1]
    assert saved.name == f"checkpoint-{last_logged['step']}"


def test_what_one_process_cannot_read_stops_both(tiny: Tiny, tmp_path: Path) -> None:
    """A clip whose header is fine and whose samples are NaN is met by one process alone."""
    records = copy_data(tiny, tmp_path)
    samples = np.full(8000, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "q7.wav", samples, 16000, subtype="FLOAT")
    data = write_jsonl(tmp_path / "data.jsonl", records)
    options = {"data_path": data, "per_device_train_batch_size": 4, "parallel": "ddp"}
    argv = tiny.stage1(tmp_path / "out", max_steps=2, **options)
    done = launch([*TORCHRUN, "train.py", *argv], timeout=LAUNCH_SECONDS)
    assert done.returncode != 0
    assert f"error: {data}:8: " in done.stderr
    assert not (tmp_path / "out" / "final_model").exists()


def run_launcher(command: list[str], env: dict[str, str] | None = None) -> str:
    done = launch(command, timeout=LAUNCH_SECONDS, env=env)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr + done.stdout


@pytest.mark.long
def test_accelerate_launch(tiny: Tiny, one: dict[int, Path], tmp_path: Path) -> None:
    """The shipped file asks for FSDP2, and train.py shards by itself.

    Without --cpu, under which accelerate starts one process whatever --num_processes says.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate_fsdp2.yaml", "--num_processes", "2"]
    command += ["--main_process_port", "0"]
    log = run_launcher([*command, "train.py", *tiny.stage1(tmp_path, **SCHEDULE | TWO)])
    assert "2 device(s)" in log
    assert "fsdp2 on cpu" in log
    assert_equal_runs(tmp_path, one[1], loss=1e-5, weight=1e-6)


def deepspeed(argv: list[str], zero: int) -> str:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    config = f"configs/ds_zero{zero}_config.json"
    with reserved_port() as port:
        command += ["--master_port", str(port), "train.py", *argv, "--deepspeed", config]
        return run_launcher(command, {"DS_ACCELERATOR": "cpu"})


@needs_compiler
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_deepspeed_equals_one_process(
    tiny: Tiny, one: dict[int, Path], tmp_path: Path, zero: int
) -> None:
    log = deepspeed(tiny.stage1(tmp_path, **SCHEDULE | TWO), zero)
    assert "deepspeed on cpu" in log
    assert_equal_runs(tmp_path, one[1], loss=1e-5, weight=1e-5)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_resumes(tiny: Tiny, tmp_path: Path, zero: int, stage: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = SCHEDULE | TWO
    deepspeed(tiny.stage(stage, whole, **options), zero)
    options["resume_from_checkpoint"] = whole / "checkpoint-2"
    deepspeed(tiny.stage(stage, resumed, **options), zero)
    assert [line["step"] for line in metrics(resumed)] == [3, 4]
    assert losses(resumed) == pytest.approx(losses(whole)[2:], abs=1e-6)
    assert_same_weights(whole / "final_model", resumed / "final_model", atol=1e-6)
