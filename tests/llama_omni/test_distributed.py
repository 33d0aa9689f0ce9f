"""Several processes over gloo, started by torchrun, accelerate and deepspeed: equal to one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from llama_omni.checkpoint import finished_checkpoints
from tests.llama_omni.tiny import (
    Tiny,
    assert_same_weights,
    copy_data,
    launch,
    losses,
    metrics,
    train,
    write_jsonl,
)

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
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
LAUNCH_SECONDS = 400  # of a busy machine that compiles DeepSpeed's ops as well


@pytest.fixture(scope="module")
def one(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """OUT of the single-process run of each stage."""
    outs = {stage: tmp_path_factory.mktemp(f"one{stage}") for stage in (1, 2)}
    for stage, out in outs.items():
        assert train(tiny.stage(stage, out, **SCHEDULE | ONE)) == 0
    return outs


def run_several(folder: Path, runs: list[tuple[list[str], int]]) -> None:
    """All runs in one pair of processes; see several_runs.py."""
    listing = folder / "runs.json"
    listing.write_text(json.dumps([{"argv": argv, "expect": code} for argv, code in runs]))
    command = [*TORCHRUN, "-m", "tests.llama_omni.several_runs", str(listing)]
    done = launch(command, cwd=ROOT, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stderr[-5000:]


def assert_equal_runs(out: Path, one_out: Path, *, loss: float, weight: float) -> None:
    assert losses(out) == pytest.approx(losses(one_out)[-len(losses(out)) :], abs=loss)
    assert_same_weights(out / "final_model", one_out / "final_model", atol=weight)


def test_two_processes_equal_one(tiny: Tiny, one: dict[int, Path], tmp_path: Path) -> None:
    """DDP and FSDP2, both stages; FSDP2 resumed bitwise, on two processes and on one."""
    cases = [(1, "ddp"), (1, "fsdp2"), (2, "ddp"), (2, "fsdp2")]
    runs = [
        (tiny.stage(stage, tmp_path / f"{kind}{stage}", parallel=kind, **SCHEDULE | TWO), 0)
        for stage, kind in cases
    ]
    checkpoint = tmp_path / "fsdp21" / "checkpoint-2"
    options = SCHEDULE | {"resume_from_checkpoint": checkpoint, "parallel": "fsdp2"}
    runs.append((tiny.stage1(tmp_path / "resumed", **options | TWO), 0))
    run_several(tmp_path, runs)
    for stage, kind in cases:
        assert_equal_runs(tmp_path / f"{kind}{stage}", one[stage], loss=1e-5, weight=1e-6)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "fsdp21")[2:]
    assert_same_weights(tmp_path / "resumed" / "final_model", tmp_path / "fsdp21" / "final_model")
    assert train(tiny.stage1(tmp_path / "alone", **options | ONE)) == 0
    assert_equal_runs(tmp_path / "alone", one[1], loss=1e-5, weight=1e-6)


def test_sharded_low_precision_states_resume_bitwise(tiny: Tiny, tmp_path: Path) -> None:
    """Float8 states and their scales as DTensors, saved and loaded by two processes."""
    options = SCHEDULE | TWO | {"bf16": True, "optimizer_precision": "8bit", "parallel": "fsdp2"}
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = tiny.stage1(tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    run_several(tmp_path, [(tiny.stage1(tmp_path / "whole", **options), 0), (resumed, 0)])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[2:]
    assert_same_weights(tmp_path / "resumed" / "final_model", tmp_path / "whole" / "final_model")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


def test_nan_stops_both_processes_before_the_step(tiny: Tiny, tmp_path: Path) -> None:
    """An absurd learning rate: what was saved is what was finite, and nobody hangs."""
    options = SCHEDULE | {"save_steps": 1, "per_device_train_batch_size": 4}
    options |= {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0.0}
    argv = tiny.stage1(tmp_path, parallel="ddp", **options)
    done = launch([*TORCHRUN, "train.py", *argv], timeout=LAUNCH_SECONDS)
    assert done.returncode != 0
    assert "nothing was stepped" in done.stderr
    assert not (tmp_path / "final_model").exists()
    last_logged = metrics(tmp_path)[-1]
    assert math.isfinite(last_logged["train/loss"])
    assert finished_checkpoints(tmp_path)[-1].name == f"checkpoint-{last_logged['step']}"


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


def run_launcher(command: list[str], **env: str) -> str:
    done = launch(command, timeout=LAUNCH_SECONDS, **env)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr + done.stdout


@pytest.mark.long
def test_accelerate_launch(tiny: Tiny, one: dict[int, Path], tmp_path: Path) -> None:
    """The shipped file, on the CPU; it asks for FSDP2 and train.py shards by itself."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate_fsdp2.yaml", "--num_processes", "2", "--cpu"]
    log = run_launcher([*command, "train.py", *tiny.stage1(tmp_path, **SCHEDULE | TWO)])
    assert "2 device(s)" in log
    assert "fsdp2 on cpu" in log
    assert_equal_runs(tmp_path, one[1], loss=1e-5, weight=1e-6)


def deepspeed(argv: list[str], zero: int, *, port: int) -> str:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    command += ["--master_port", str(port), "train.py", *argv]
    config = f"configs/ds_zero{zero}_config.json"
    return run_launcher([*command, "--deepspeed", config], DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_deepspeed_equals_one_process(
    tiny: Tiny, one: dict[int, Path], tmp_path: Path, zero: int
) -> None:
    log = deepspeed(tiny.stage1(tmp_path, **SCHEDULE | TWO), zero, port=29600 + zero)
    assert "deepspeed on cpu" in log
    assert_equal_runs(tmp_path, one[1], loss=1e-5, weight=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_resumes(tiny: Tiny, tmp_path: Path, zero: int, stage: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = SCHEDULE | TWO
    deepspeed(tiny.stage(stage, whole, **options), zero, port=29610)
    options["resume_from_checkpoint"] = whole / "checkpoint-2"
    deepspeed(tiny.stage(stage, resumed, **options), zero, port=29611)
    assert [line["step"] for line in metrics(resumed)] == [3, 4]
    assert losses(resumed) == pytest.approx(losses(whole)[2:], abs=1e-6)
    assert_same_weights(whole / "final_model", resumed / "final_model", atol=1e-6)
