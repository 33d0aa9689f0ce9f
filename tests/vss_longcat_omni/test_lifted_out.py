"""vss_longcat_omni/ alone, copied to another place and installed there, trains from inside itself
and merges what it trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import vss_longcat_omni

if TYPE_CHECKING:
    from tests.vss_longcat_omni.conftest import Ground

FOLDER = Path(vss_longcat_omni.__file__).parent
# What a user of the folder may have in it.
IGNORED = ("__pycache__", "*.egg-info", "cache", "data", "longcat-flash-omni-*", "small_model",
           "tensorboard_logs")  # fmt: skip
CHECK = """
import importlib.util, pathlib, sys
import vss_longcat_omni.generate, vss_longcat_omni.train_ds
import vss_longcat_omni.speech.longcat_codec.codec
for name, module in sys.modules.items():
    if name.startswith("vss_longcat_omni"):
        assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
for name in ("tests", "data"):
    assert importlib.util.find_spec(name) is None, name
"""


def test_a_copy_installs_trains_and_merges(ground: Ground, tmp_path: Path) -> None:
    copy, site = tmp_path / "elsewhere" / "vss_longcat_omni", tmp_path / "site"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns(*IGNORED))
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard_logs"),
    }

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(arg) for arg in command], cwd=copy, capture_output=True, text=True, env=env,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # What `pip install --no-deps --target` does, where pip may not be there.
    run(sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')")
    (wheel,) = copy.parent.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    for name in ("ds_config.json", "ds_config_nvme.json", "run_deepspeed.sh"):
        assert (site / "vss_longcat_omni" / name).is_file()
    run(sys.executable, "-c", CHECK, tmp_path)
    out, merged = tmp_path / "out", tmp_path / "merged"
    argv = ground.argv(out, deepspeed="", bf16=False, max_steps=1)
    run(sys.executable, "train_ds.py", *argv)
    command = (sys.executable, "-m", "vss_longcat_omni.tools.merge_lora")
    printed = run(*command, "--base", ground.model, "--adapter", out, "--out", merged)
    assert printed.endswith("32 tensors changed\n")
    assert {path.name for path in ground.model.iterdir()} <= {p.name for p in merged.iterdir()}
