"""A whole training from nothing on made videos, stage by stage; demo.py and small_result.py use it.

    data -> vae -> model -> cache -> train -> export -> evaluate

Every stage runs the folder's own commands inside one folder OUT and is then marked as done in
OUT/stages.json, so that the same command continues where it was stopped. The folder's config files
are copied to OUT; their relative paths count from there.
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
    """The next stage would not fit; the same command continues with it."""


@dataclass(frozen=True, kw_only=True)
class EndToEndRun:
    """The settings of one end-to-end run."""

    out: Path
    configs: Path  # training_config.json and databackend.json
    size: str  # of make_model.SIZES
    num_videos: int
    num_held_out: int  # videos of combinations that training never sees
    width: int
    height: int
    num_frames: int
    vae_argv: tuple[str, ...]  # options of train_vae.py
    cache_processes: int  # they share one GPU
    launcher: tuple[str, ...]  # before `-m longcat_video_fft.train`
    started: float = field(default_factory=time.monotonic)
    seconds: float = float("inf")  # that this call may take
    reserve: float = 0.0  # of them, kept for what follows the training

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def stages(self) -> dict[str, Callable[[EndToEndRun], None]]:
        """Returns the stages in their order, without the evaluation."""
        return {
            "data": make_data, "vae": train_vae, "model": make_model, "cache": make_cache,
            "train": train, "export": export,
        }  # fmt: skip


def run_stage(e2e: EndToEndRun, name: str, work: Callable[[EndToEndRun], None]) -> None:
    """Runs a stage unless it is done.

    Raises:
        OutOfTimeError: this call's time is up.
        SystemExit: one of its commands failed.
    """
    stages = read_stages(e2e.out)
    before = stages.setdefault(name, {"seconds": 0.0, "is_done": False})
    if before["is_done"]:
        say(f"== {name}: done before, in {before['seconds']:.0f} s\n")
        return
    if e2e.seconds_left <= 0:
        raise OutOfTimeError(f"no time is left for the stage {name}")
    say(f"\n== {name}\n")
    started = time.monotonic()
    try:
        work(e2e)
        before["is_done"] = True
    finally:
        before["seconds"] += time.monotonic() - started
        write_stages(e2e.out, stages)


def reopen_stages(out: Path, *names: str) -> None:
    """Opens these stages to be done again, or continued; their seconds add up."""
    stages = read_stages(out)
    for name in set(names) & set(stages):
        stages[name]["is_done"] = False
    write_stages(out, stages)


def read_stages(out: Path) -> dict[str, dict[str, Any]]:
    """Returns seconds so far and is_done, by the name of a stage that was begun."""
    path = out / STAGES
    return json.loads(path.read_text()) if path.is_file() else {}


def stage_seconds(out: Path) -> dict[str, float]:
    return {name: round(stage["seconds"], 1) for name, stage in read_stages(out).items()}


def write_stages(out: Path, stages: dict[str, dict[str, Any]]) -> None:
    (out / STAGES).write_text(json.dumps(stages, indent=2) + "\n")


def make_data(e2e: EndToEndRun) -> None:
    """Makes videos of shapes with captions; those of HELD_OUT show other combinations."""
    for split, count in ((TRAIN, e2e.num_videos), (HELD_OUT, e2e.num_held_out)):
        run_command(
            e2e, "data.make_videos", split, "--count", count, "--split", split,
            "--width", e2e.width, "--height", e2e.height,
            "--seconds", f"{e2e.num_frames / 15:.4f}", "--workers", os.cpu_count() or 1,
        )  # fmt: skip
    for name in ("training_config.json", "databackend.json"):
        shutil.copyfile(e2e.configs / name, e2e.out / name)


def train_vae(e2e: EndToEndRun) -> None:
    """Trains the VAE; continues the one that is there, if the stage was opened again."""
    before = ("--start-from", "vae") if (e2e.out / "vae").is_dir() else ()
    run_command(
        e2e, "tests.demos.longcat_video_fft.train_vae", TRAIN, "vae",
        "--num-frames", e2e.num_frames, *e2e.vae_argv, *before,
    )  # fmt: skip


def make_model(e2e: EndToEndRun) -> None:
    run_command(
        e2e, "longcat_video_fft.tools.make_model", "model",
        "--size", e2e.size, "--captions", TRAIN, "--vae", "vae",
    )  # fmt: skip


def make_cache(e2e: EndToEndRun) -> None:
    """Makes the cache by several processes on one GPU: each video is too small to use it alone."""
    count = e2e.cache_processes
    if count == 1:
        return run_command(e2e, "longcat_video_fft.precompute", "--config", "training_config.json")
    argv = command("longcat_video_fft.precompute", "--config", "training_config.json")
    say(f"$ {shown(argv)}    ({count} processes on one GPU)\n")
    port = free_port()
    processes = []
    for rank in range(count):
        env = environment(
            RANK=rank, WORLD_SIZE=count, LOCAL_RANK=0, LOCAL_WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        processes.append(subprocess.Popen(argv, cwd=e2e.out, env=env))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"the cache: a process failed, exit statuses {codes}")
    return None


def train(e2e: EndToEndRun) -> None:
    """Trains to the config's last step, or as long as this call's time allows: a SIGTERM makes a
    checkpoint, which is exported."""
    argv = [
        PYTHON, *e2e.launcher, "-m", "longcat_video_fft.train",
        "--config", "training_config.json", "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    say(f"$ {shown(argv)}\n")
    seconds = e2e.seconds_left - e2e.reserve
    if seconds <= 0:
        raise OutOfTimeError("no time is left for the training")
    process = subprocess.Popen(argv, cwd=e2e.out, env=environment())
    try:
        code = process.wait(seconds if seconds < 1e9 else None)
    except subprocess.TimeoutExpired:
        say("\nthe time is up: SIGTERM, which makes a checkpoint\n")
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code:
        raise SystemExit(f"the training failed with exit status {code}")


def export(e2e: EndToEndRun) -> None:
    """Exports the averaged weights of the newest checkpoint."""
    run_command(
        e2e, "longcat_video_fft.export", "--checkpoint", "latest",
        "--config", "training_config.json", "--output", "export", "--ema",
    )  # fmt: skip


def run_command(e2e: EndToEndRun, module: str, *argv: object) -> None:
    """Runs one command inside OUT, with its output shown.

    Raises:
        SystemExit: it failed.
    """
    line = command(module, *argv)
    say(f"$ {shown(line)}\n")
    code = subprocess.run(line, cwd=e2e.out, env=environment(), check=False).returncode
    if code:
        raise SystemExit(f"{module}: failed with exit status {code}")


def command(module: str, *argv: object) -> list[str]:
    return [PYTHON, "-m", module, *map(str, argv)]


def environment(**more: object) -> dict[str, str]:
    """Returns the environment with one thread an operator, unless it names a number: two on two
    cores that others use too wait for each other, up to ten times as long."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore",
        **{key: str(value) for key, value in more.items()},
    }  # fmt: skip


def shown(argv: list[str]) -> str:
    """Formats a command as one would type it."""
    line = " ".join(["python" if part == PYTHON else part for part in argv])
    return line.replace("python -m accelerate.commands.accelerate_cli", "accelerate")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
