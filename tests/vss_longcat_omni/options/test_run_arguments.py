"""Mistakes in our own options, told before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vss_longcat_omni
from vss_longcat_omni import train_ds
from vss_longcat_omni.options.run_arguments import check_words, expand_config

if TYPE_CHECKING:
    from tests.vss_longcat_omni.conftest import Ground

FOLDER = Path(vss_longcat_omni.__file__).parent


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_a_mistake_is_named(words: list[str], message: str, ground: Ground) -> None:
    with pytest.raises(ValueError, match="^.*" + message.replace("(", r"\(")):
        train_ds.main(["--data_dir", str(ground.data), *words])


def test_good_words_of_others_pass(ground: Ground) -> None:
    words = ["--data_dir", str(ground.data), "--learning_rate", "1e-3", "--packing", "false"]
    words += ["--local_rank=1", "--lora_target_modules", "o_proj", "--bf16"]
    found = check_words(words)
    assert found is not None
    assert found.data_dir == str(ground.data)


def test_help_needs_no_data() -> None:
    assert check_words(["--help", "--data_dir", "/nowhere"]) is None


def test_a_config_file_stands_for_flags_that_later_ones_override(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    values = {"lora_r": 4, "lora_target_modules": ["o_proj", "q_b_proj"], "codec": None}
    path.write_text(json.dumps(values))
    words = expand_config(["--config", str(path), "--lora_r", "8"])
    assert words == [
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


def test_the_script_tells_it_without_torch(tmp_path: Path) -> None:
    words = [sys.executable, "-X", "importtime", "train_ds.py", "--data_dir", str(tmp_path)]
    done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: No valid samples found" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy"}
