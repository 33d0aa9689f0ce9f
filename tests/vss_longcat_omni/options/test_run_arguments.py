"""Mistakes in our own options are reported before torch is imported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vss_longcat_omni
from vss_longcat_omni import train_ds
from vss_longcat_omni.options.run_arguments import add_max_frames, check_argv, expand_config

if TYPE_CHECKING:
    from tests.vss_longcat_omni.conftest import Ground

FOLDER = Path(vss_longcat_omni.__file__).parent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_r", "0"], "lora_r=0: give 1 or more"),
        (["--tuning", "half"], "tuning='half': choose one of lora, full"),
        (["--lora_dropout", "1.5"], "lora_dropout=1.5"),
        (["--lora_target_modules", "o_proj", "nothing"], "nothing"),
        (["--data_dir", "/nowhere"], "/nowhere is not there"),
        (["--deepspeed", "/nowhere/ds.json"], "deepspeed=/nowhere/ds.json: no such file"),
        (["--config", "/nowhere/run.json"], "/nowhere/run.json: no such file"),
        (["--config"], "needs a JSON file"),
    ],
)
def test_a_mistake_is_named(argv: list[str], message: str, ground: Ground) -> None:
    with pytest.raises(ValueError, match="^.*" + message.replace("(", r"\(")):
        train_ds.main(["--data_dir", str(ground.data), *argv])


def test_good_options_of_others_pass(ground: Ground) -> None:
    argv = ["--data_dir", str(ground.data), "--learning_rate", "1e-3", "--packing", "false"]
    argv += ["--local_rank=1", "--lora_target_modules", "o_proj", "--bf16"]
    found = check_argv(argv)
    assert found is not None
    assert found.data_dir == str(ground.data)


def test_help_needs_no_data() -> None:
    assert check_argv(["--help", "--data_dir", "/nowhere"]) is None


def test_a_config_file_stands_for_flags_that_later_ones_override(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    values = {"lora_r": 4, "lora_target_modules": ["o_proj", "q_b_proj"], "codec": None}
    path.write_text(json.dumps(values))
    argv = expand_config(["--config", str(path), "--lora_r", "8"])
    assert argv == [
        "--lora_r",
        "4",
        "--lora_target_modules",
        "o_proj",
        "q_b_proj",
        "--lora_r",
        "8",
    ]
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        expand_config(["--config", str(path)])


def test_max_rows_is_still_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_max_frames(parser, default=500)
    assert vars(parser.parse_args([])) == {"max_frames": 500}
    assert vars(parser.parse_args(["--max_frames", "7"])) == {"max_frames": 7}
    assert capsys.readouterr().err == ""
    assert vars(parser.parse_args(["--max_rows", "8"])) == {"max_frames": 8}
    assert capsys.readouterr().err == "--max_rows is now --max_frames\n"


def test_the_script_reports_it_without_torch(tmp_path: Path) -> None:
    argv = [sys.executable, "-X", "importtime", "train_ds.py", "--data_dir", str(tmp_path)]
    done = subprocess.run(argv, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: No valid samples found" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy"}
