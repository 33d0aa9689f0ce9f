"""A whole training from nothing on made videos, stage by stage; demo.py and small_result.py use it.

    data -> vae -> model -> cache -> train -> export -> judge

Every stage runs the folder's own commands inside one folder OUT and is then marked as done in
OUT/stages.json, so that the same command goes on where it was stopped. The folder's config files
are copied to OUT; their relative paths are meant from there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
STAGES = "stages.json"
TRAIN, HELD_OUT = "train", "held_out"
PYTHON = sys.executable


class OutOfTimeError(RuntimeError):
    """The next stage would not fit; the same command goes on with it."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one trial is made of."""

    out: Path
    configs: Path  # training_config.json and databackend.json
    size: str  # of make_model.SIZES
    num_videos: int
    num_held_out: int  # videos of combinations that training never sees
    width: int
    height: int
    num_frames: int
    vae_words: tuple[str, ...]  # options of train_vae.py
    cache_processes: int  # they share one GPU
    launcher: tuple[str, ...]  # before `-m longcat_video_fft.train`
    started: float = field(default_factory=time.monotonic)
    seconds: float = float("inf")  # that this call may take
    reserve: float = 0.0  # of them, kept for what follows the training

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def stages(self) -> dict[str, Callable[[Trial], None]]:
        """In their order, without the judge's."""
        return {
            "data": make_data, "vae": train_vae, "model": make_model, "cache": make_cache,
            "train": train, "export": export,
        }  # fmt: skip


def run_stage(trial: Trial, name: str, work: Callable[[Trial], None]) -> None:
    """Runs a stage unless it is done.

    Raises:
        OutOfTimeError: this call's time is up.
        SystemExit: one of its commands failed.
    """
    stages = read_stages(trial.out)
    before = stages.setdefault(name, {"seconds": 0.0, "is_done": False})
    if before["is_done"]:
        say(f"== {name}: done before, in {before['seconds']:.0f} s\n")
        return
    if trial.seconds_left <= 0:
        raise OutOfTimeError(f"no time is left for the stage {name}")
    say(f"\n== {name}\n")
    started = time.monotonic()
    try:
        work(trial)
        before["is_done"] = True
    finally:
        before["seconds"] += time.monotonic() - started
        write_stages(trial.out, stages)


def reopen_stages(out: Path, *names: str) -> None:
    """These stages are done again, or go on; their seconds add up."""
    stages = read_stages(out)
    for name in set(names) & set(stages):
        stages[name]["is_done"] = False
    write_stages(out, stages)


def read_stages(out: Path) -> dict[str, dict[str, Any]]:
    """By the name of a stage that was begun: seconds so far, is_done."""
    path = out / STAGES
    return json.loads(path.read_text()) if path.is_file() else {}


def stage_seconds(out: Path) -> dict[str, float]:
    return {name: round(stage["seconds"], 1) for name, stage in read_stages(out).items()}


def write_stages(out: Path, stages: dict[str, dict[str, Any]]) -> None:
    (out / STAGES).write_text(json.dumps(stages, indent=2) + "\n")


def make_data(trial: Trial) -> None:
    """Videos of shapes with captions; those of HELD_OUT show other combinations."""
    for split, count in ((TRAIN, trial.num_videos), (HELD_OUT, trial.num_held_out)):
        run(
            trial, "data.make_videos", split, "--count", count, "--split", split,
            "--width", trial.width, "--height", trial.height,
            "--seconds", f"{trial.num_frames / 15:.4f}", "--workers", os.cpu_count() or 1,
        )  # fmt: skip
    for name in ("training_config.json", "databackend.json"):
        shutil.copyfile(trial.configs / name, trial.out / name)


def train_vae(trial: Trial) -> None:
    """Goes on with the one that is there, if the stage was opened again."""
    before = ("--start-from", "vae") if (trial.out / "vae").is_dir() else ()
    run(
        trial, "tests.demos.longcat_video_fft.train_vae", TRAIN, "vae",
        "--num-frames", trial.num_frames, *trial.vae_words, *before,
    )  # fmt: skip


def make_model(trial: Trial) -> None:
    run(
        trial, "longcat_video_fft.tools.make_model", "model",
        "--size", trial.size, "--captions", TRAIN, "--vae", "vae",
    )  # fmt: skip


def make_cache(trial: Trial) -> None:
    """Several processes on one GPU: one could not fill it, since each video is small."""
    count = trial.cache_processes
    words = command("longcat_video_fft.precompute", "--config", "training_config.json")
    if count == 1:
        return run(trial, "longcat_video_fft.precompute", "--config", "training_config.json")
    say(f"$ {shown(words)}    ({count} processes on one GPU)\n")
    port = free_port()
    processes = []
    for rank in range(count):
        env = environment(
            RANK=rank, WORLD_SIZE=count, LOCAL_RANK=0, LOCAL_WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        processes.append(subprocess.Popen(words, cwd=trial.out, env=env))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"the cache: a process failed, exit statuses {codes}")
    return None


def train(trial: Trial) -> None:
    """To the config's last step, or as long as this call's time allows: a SIGTERM makes a
    checkpoint, which is exported."""
    words = [
        PYTHON, *trial.launcher, "-m", "longcat_video_fft.train",
        "--config", "training_config.json", "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    say(f"$ {shown(words)}\n")
    seconds = trial.seconds_left - trial.reserve
    if seconds <= 0:
        raise OutOfTimeError("no time is left for the training")
    process = subprocess.Popen(words, cwd=trial.out, env=environment())
    try:
        code = process.wait(seconds if seconds < 1e9 else None)
    except subprocess.TimeoutExpired:
        say("\nthe time is up: SIGTERM, which makes a checkpoint\n")
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code:
        raise SystemExit(f"the training failed with exit status {code}")


def export(trial: Trial) -> None:
    """The averaged weights of the newest checkpoint."""
    run(
        trial, "longcat_video_fft.export", "--checkpoint", "latest",
        "--config", "training_config.json", "--output", "export", "--ema",
    )  # fmt: skip


def run(trial: Trial, module: str, *words: object) -> None:
    """Runs one command inside OUT, with its output shown.

    Raises:
        SystemExit: it failed.
    """
    line = command(module, *words)
    say(f"$ {shown(line)}\n")
    code = subprocess.run(line, cwd=trial.out, env=environment(), check=False).returncode
    if code:
        raise SystemExit(f"{module}: failed with exit status {code}")


def command(module: str, *words: object) -> list[str]:
    return [PYTHON, "-m", module, *map(str, words)]


def environment(**more: object) -> dict[str, str]:
    """One thread an operator, unless told otherwise: two on two cores that others use too wait for
    each other, up to ten times as long."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore",
        **{key: str(value) for key, value in more.items()},
    }  # fmt: skip


def shown(words: list[str]) -> str:
    """A command as one would type it."""
    line = " ".join(["python" if word == PYTHON else word for word in words])
    return line.replace("python -m accelerate.commands.accelerate_cli", "accelerate")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
