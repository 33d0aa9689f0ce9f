"""longcat_video_fft/ alone, copied to another place and installed there, makes the same caches."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.longcat_video_fft.support.tiny import (
    NUM_VIDEOS,
    ROOT,
    Tiny,
    contents,
    launch_env,
    write_configs,
)

if TYPE_CHECKING:
    from pathlib import Path

CHECK = """
import importlib.util, pathlib, sys
import longcat_video_fft.precompute.job as module
assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
for name in ("tests", "data"):
    assert importlib.util.find_spec(name) is None, name
"""


def test_a_copy_installs_and_makes_caches(tiny: Tiny, tmp_path: Path) -> None:
    copy, site = tmp_path / "elsewhere" / "longcat_video_fft", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "longcat_video_fft", copy, ignore=ignored)

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [str(part) for part in command], cwd=copy, capture_output=True, text=True,
            env=launch_env(PYTHONPATH=str(site)), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    # What `pip install --no-deps --target` does, where pip may not be there.
    run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')")
    (wheel,) = copy.parent.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    for name in (
        "training_config.json",
        "databackend.json",
        "scripts/generate_metadata_parquet.py",
    ):
        assert (site / "longcat_video_fft" / name).is_file()
    run(sys.executable, "-c", CHECK, tmp_path)
    config = write_configs(tmp_path / "run", tiny)
    run(sys.executable, "-m", "longcat_video_fft.precompute", "--config", config)
    assert len(contents(tmp_path / "run" / "vae")) == NUM_VIDEOS
