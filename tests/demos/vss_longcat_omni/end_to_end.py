"""Runs the folder's own commands as a user types them, for demo.py and small_result.py."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "vss_longcat_omni"


def run(
    title: str, *argv: str | Path, cwd: Path = FOLDER, env: Mapping[str, str] | None = None
) -> None:
    """Run a command, with `env` beside the user's variables; SystemExit where it fails."""
    say(f"\n== {title}\n$ {' '.join(shown(arg, cwd) for arg in argv)}\n")
    started = time.monotonic()
    command = [str(arg) for arg in argv]
    if command[0] in ("python", "deepspeed"):
        command[0] = str(Path(sys.executable).parent / command[0])
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    status = subprocess.call(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {}), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
    )
    if status:
        raise SystemExit(f"{title}: failed with exit status {status}")
    say(f"({time.monotonic() - started:.0f} s)\n")


def shown(arg: str | Path, cwd: Path) -> str:
    """Show paths below the repository relative to `cwd`, as a reader would type them there."""
    is_ours = isinstance(arg, Path) and arg.is_relative_to(ROOT)
    return shlex.quote(os.path.relpath(arg, cwd) if is_ours else str(arg))


def make_samples(data_dir: Path, *, num_training: int, num_test: int) -> None:
    """Make samples; the test's combinations and voices are in no sample of the training."""
    for name, split, count, seed in (
        ("training", "train", num_training, 0),
        ("test", "test", num_test, 1),
    ):
        run(
            f"{count} samples: {name}", "python", "-m", "data.make_vss", data_dir / name,
            "--split", split, "--count", str(count), "--seed", str(seed),
            "--workers", str(num_cores()), cwd=ROOT,
        )  # fmt: skip


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
