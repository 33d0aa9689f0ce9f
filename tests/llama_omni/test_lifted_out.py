"""llama_omni/ alone, copied to another place and installed there, trains from inside itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.llama_omni.support.tiny import FOLDER, Tiny, launch_env, losses, weights

if TYPE_CHECKING:
    from pathlib import Path

CHECK = """
import importlib.util, pathlib, sys
import llama_omni.train, llama_omni.generate
for module in (llama_omni.train, llama_omni.generate):
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
for name in ("tests", "data"):
    assert importlib.util.find_spec(name) is None, name
"""


def test_a_copy_installs_and_trains(tiny: Tiny, tmp_path: Path) -> None:
    copy, site = tmp_path / "elsewhere" / "llama_omni", tmp_path / "site"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(argument) for argument in command], cwd=copy, capture_output=True, text=True,
            env=launch_env(PYTHONPATH=str(site), PYTHON=sys.executable), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    # What `pip install --no-deps --target` does, where pip may not be there.
    run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')")
    (wheel,) = copy.parent.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    assert (site / "llama_omni" / "configs" / "stage1_config.json").is_file()
    assert (site / "llama_omni" / "scripts" / "run_stage1.sh").is_file()
    run(sys.executable, "-c", CHECK, tmp_path)
    out = tmp_path / "out"
    argv = tiny.stage1(out, max_steps=2, global_batch_size=8)
    log = run("bash", "scripts/run_stage1.sh", "configs/stage1_config.json", tiny.data, out, *argv)
    assert "global batch 8" in log
    assert len(losses(out)) == 2
    assert weights(out / "final_model")
