"""The training as users start it: accelerate launches two processes on the CPU, over gloo."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from longcat_video_fft.train import main
from tests.longcat_video_fft.support.s3_server import put_objects
from tests.longcat_video_fft.support.tiny import (
    ROOT,
    Tiny,
    launch,
    launch_env,
    make_transformer,
    write_configs,
)

if TYPE_CHECKING:
    from pathlib import Path

# Float32 throughout, so that runs compare bit by bit.
OPTIONS: dict[str, Any] = {
    "optimizer": "adamw", "mixed_precision": "no", "max_text_tokens": 128, "max_train_steps": 6,
    "checkpointing_steps": 3, "gradient_accumulation_steps": 2, "train_batch_size": 2,
    "lr_warmup_steps": 2, "learning_rate": 1e-3, "dataloader_num_workers": 0,
    "num_held_out_samples": 2, "validation_step_interval": 1000, "ema_decay": 0.9,
    "image_to_video_probability": 0.3, "continuation_probability": 0.2,
    "validation_prompt": None, "report_to": "none",
}  # fmt: skip


def configure(tiny: Tiny, folder: Path, **options: Any) -> Path:
    """Writes a config whose outputs go below `folder`."""
    out: dict[str, Any] = {
        "output_dir": str(folder / "out"), "logging_dir": str(folder / "logs"),
    }  # fmt: skip
    return write_configs(folder, tiny, **OPTIONS | out | options)


def train_command(config: Path, *argv: str, processes: int = 2) -> list[str]:
    """Returns the documented command; without the yaml accelerate starts one process on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "longcat_video_fft" / "scripts/accelerate_fsdp2.yaml")]
    launcher += [f"--num_processes={processes}", "--mixed_precision=no"]
    port = ["--main_process_port=0"] if processes > 1 else []
    return [*launcher, *port, "-m", "longcat_video_fft.train", "--config", str(config), *argv]


def run(config: Path, *argv: str, processes: int = 2) -> str:
    done = launch(train_command(config, *argv, processes=processes), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def state_of(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Returns a checkpoint's tensors, flat and whole."""
    merged = tmp_path / f"{checkpoint.parent.parent.name}.pt"
    dcp_to_torch_save(checkpoint / "state", merged)
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}")
        else:
            flat[path] = value

    walk(torch.load(merged, weights_only=True), "")
    return flat


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Trains six steps from videos alone; returns (folder, what was logged)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(configure(tiny, folder))


@pytest.fixture
def again(tiny: Tiny, whole: tuple[Path, str], tmp_path: Path) -> Path:
    """Returns a folder with the caches of `whole` and its checkpoint of step 3."""
    for name in ("vae", "text"):
        shutil.copytree(whole[0] / name, tmp_path / name)
    shutil.copytree(whole[0] / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    return tmp_path


def test_one_command_from_videos_to_a_model(whole: tuple[Path, str]) -> None:
    folder, log = whole
    out = folder / "out"
    assert "they are made first" in log
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert (out / "checkpoint-3").is_dir()
    assert (out / "checkpoint-6").is_dir()
    assert json.loads((out / "model_index.json").read_text())["_class_name"]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval/loss", "eval/loss_t100", "eval/loss_t900"} <= set(last)


def test_three_and_three_steps_are_six(
    tiny: Tiny, whole: tuple[Path, str], again: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = run(configure(tiny, again), "--resume_from_checkpoint", "latest")
    assert "resumed from" in log
    assert losses(again) == {step: losses(whole[0])[step] for step in (4, 5, 6)}
    scratch = tmp_path_factory.mktemp("states")
    wanted = state_of(whole[0] / "out" / "checkpoint-6", scratch)
    found = state_of(again / "out" / "checkpoint-6", scratch)
    assert found.keys() == wanted.keys()
    assert any("exp_avg" in name for name in found)
    assert any("averages" in name for name in found)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, {"gradient_accumulation_steps": 4}),
        (2, {"gradient_accumulation_steps": 4, "context_parallel_size": 2}),
        (2, {"gradient_checkpointing_mode": "full", "musubi_blocks_to_swap": 1}),
        (2, {"fsdp_replicate_size": 2}),
    ],
    ids=["one process", "context parallel", "recomputing and offload", "replicas"],
)
def test_other_layouts_resume_alike(
    tiny: Tiny, whole: tuple[Path, str], again: Path, processes: int, options: dict[str, Any]
) -> None:
    """Another layout has the same global batches from the checkpoint of two processes on."""
    config = configure(tiny, again, **options)
    run(config, "--resume_from_checkpoint", "latest", processes=processes)
    wanted = [losses(whole[0])[step] for step in (4, 5, 6)]
    assert list(losses(again).values()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit"])
def test_low_precision_trains(tiny: Tiny, again: Path, optimizer: str) -> None:
    shutil.rmtree(again / "out")
    options = {"mixed_precision": "bf16", "max_train_steps": 2, "ema_decay": None}
    run(configure(tiny, again, optimizer=optimizer, **options), processes=1)
    first, second = losses(again).values()
    assert second == pytest.approx(first, rel=0.5)


def test_a_sigterm_saves_and_the_run_resumes(
    tiny: Tiny, whole: tuple[Path, str], again: Path
) -> None:
    config = configure(
        tiny, again, max_train_steps=100000, checkpointing_steps=100000, dataloader_num_workers=1
    )
    command = train_command(config, "--resume_from_checkpoint", "latest")
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_env(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        metrics = again / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)  # all of them, as SLURM does
        process.communicate(timeout=240)
    steps = [int(p.name.split("-")[1]) for p in (again / "out").glob("checkpoint-*")]
    last = max(steps)
    assert last > 3
    assert (again / "out" / f"checkpoint-{last}" / "trainer_state.json").is_file()
    assert max(losses(again)) == last


def test_caches_in_s3(
    tiny: Tiny, whole: tuple[Path, str], tmp_path: Path, s3_url: str, s3_environment: None
) -> None:
    paths = [p for name in ("vae", "text") for p in (whole[0] / name).rglob("*") if p.is_file()]
    objects = {f"copy/{p.relative_to(whole[0])}": p.read_bytes() for p in paths}
    put_objects(s3_url, "caches-to-train-from", objects)
    folders = {name: f"s3://caches-to-train-from/copy/{name}" for name in ("vae", "text")}
    config = write_configs(
        tmp_path,
        tiny,
        videos={"cache_dir_vae": folders["vae"], "aws_endpoint_url": s3_url},
        text={"cache_dir": folders["text"]},
        **OPTIONS | {"output_dir": str(tmp_path / "out"), "gradient_accumulation_steps": 4},
    )
    assert main(["--config", str(config), "--max_train_steps", "1", "--lr_warmup_steps", "2"]) == 0
    assert losses(tmp_path)[1] == pytest.approx(losses(whole[0])[1], rel=1e-5)


def main_error(config: Path, *argv: str) -> str:
    """Returns the message of the command when it fails."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(["--config", str(config), *argv]) != 0
    return stderr.getvalue()


def test_errors_name_what_is_wrong(tiny: Tiny, again: Path) -> None:
    config = configure(tiny, again)
    other = again / "other"
    shutil.copytree(tiny.model, other)
    make_transformer(other / "dit", depth=3)
    message = main_error(
        config, "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", str(other)
    )
    assert "checkpoint-3" in message
    assert "depth" in message
    for path in (other / "dit").glob("*.safetensors"):
        path.unlink()
    message = main_error(config, "--pretrained_model_name_or_path", str(other))
    assert str(other / "dit") in message
    (other / "vae" / "extra.json").write_text("{}")
    message = main_error(config, "--pretrained_model_name_or_path", str(other))
    assert "vae_sha256" in message
    shutil.rmtree(other / "dit")
    message = main_error(config, "--pretrained_model_name_or_path", str(other))
    assert "dit/config.json" in message


def test_config_errors_come_before_anything_heavy(tiny: Tiny, again: Path) -> None:
    config = configure(tiny, again, fsdp_replicate_size=3)
    module = [sys.executable, "-X", "importtime", "-m", "longcat_video_fft.train"]
    done = launch([*module, "--config", str(config)])
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "fsdp_replicate_size=3" in done.stderr
    assert " torch" not in done.stderr
