"""training_config.json: keys, types, errors, the command line, how soon a mistake is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longcat_video_fft.options.config import FIELDS, OFFICIAL_MODEL, TrainConfig
from longcat_video_fft.options.load import load_config, read_configs
from longcat_video_fft.precompute.__main__ import check_caches_are_folders, main
from tests.longcat_video_fft.support.tiny import ROOT, launch_env

SHIPPED = ROOT / "longcat_video_fft" / "training_config.json"
HEAVY = ("torch", "transformers", "av", "pyarrow", "numpy", "boto3", "diffusers")
NEEDED = {"data_backend_config": "databackend.json"}


def write(folder: Path, content: Any) -> str:
    path = folder / "training_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_shipped_config_is_the_source_documents() -> None:
    config = load_config(["--config", str(SHIPPED)])
    assert config.model == OFFICIAL_MODEL
    assert (config.learning_rate, config.lr_scheduler, config.lr_warmup_steps) == (
        1e-5,
        "cosine",
        500,
    )
    assert (config.max_train_steps, config.checkpointing_steps) == (30000, 2500)
    assert config.train_batch_size * config.gradient_accumulation_steps * 8 == 32
    assert config.optimizer == "adamw_bf16"
    assert (config.fsdp_enable, config.fsdp_version) == (True, 2)
    assert (config.validation_resolution, config.validation_num_video_frames) == ("480x832", 93)
    assert config.source == str(SHIPPED)
    assert config.folder == SHIPPED.parent
    assert (config.folder / str(config.data_backend_config)).is_file()


def test_the_shipped_values_are_the_defaults() -> None:
    """Whoever deletes a line of the shipped file gets what the line had."""
    shipped = json.loads(SHIPPED.read_text())
    given = {key: value for key, value in shipped.items() if not key.startswith("_")}
    own = {"data_backend_config", "pretrained_model_name_or_path", "validation_prompt"}
    assert given.keys() <= FIELDS.keys()
    defaults = TrainConfig()
    for key in given.keys() - own:
        assert getattr(defaults, key) == given[key], key


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = write(tmp_path, {**NEEDED, "seed": 1, "learning_rate": 1e-3, "decode_workers": 3})
    config = load_config(
        ["--config", file, "--seed=7", "--learning_rate", "2", "--decode_workers", "null",
         "--vae_compile", "false", "--disable_tf32", "--validation_prompt", "a cat",
         "--logit_mean", "-1", "--output_dir=a=b"]
    )  # fmt: skip
    assert (config.seed, config.learning_rate, config.decode_workers) == (7, 2.0, None)
    assert (config.vae_compile, config.disable_tf32) == (False, True)
    assert (config.validation_prompt, config.logit_mean) == ("a cat", -1.0)
    assert config.output_dir == "a=b"
    assert load_config(["--config", file]).seed == 1


def test_both_spellings_of_the_source_document(tmp_path: Path) -> None:
    older = {"validation_every_n_steps": 1000, "num_validation_videos": 4}
    file = write(tmp_path, NEEDED | older | {"num_validation_images": 4})
    config = load_config(["--config", file])
    assert (config.validation_step_interval, config.num_validation_images) == (1000, 4)
    config = load_config(["--config", file, "--validation_step_interval", "7"])
    assert config.validation_step_interval == 7
    file = write(tmp_path, NEEDED | {"validation_step_interval": 9})
    config = load_config(["--config", file, "--validation_every_n_steps=8"])
    assert config.validation_step_interval == 8


def test_a_run_needs_no_file() -> None:
    config = load_config(["--data_backend_config", "d.json"])
    assert (config.source, config.folder) == ("the command line", Path())


def test_comments_are_ignored(tmp_path: Path) -> None:
    comments = {"_comment": "x", "_musubi_blocks_to_swap": 4, "_learning_rat": []}
    config = load_config(["--config", write(tmp_path, NEEDED | comments)])
    assert config.musubi_blocks_to_swap == 0


def test_whole_numbers_are_floats(tmp_path: Path) -> None:
    config = load_config(["--config", write(tmp_path, NEEDED | {"learning_rate": 1})])
    assert type(config.learning_rate) is float


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"learning_rat": 1}, ["unknown key 'learning_rat'", "'learning_rate'"]),
        ({"data_backend": "x"}, ["Did you mean 'data_backend_config'"]),
        ({"zzzz": 1}, ["unknown key 'zzzz'", "README.md"]),
        ({"source": "x"}, ["unknown key 'source'"]),
        ({"seed": "7"}, ["seed='7'", "type int"]),
        ({"seed": True}, ["seed=True", "type int"]),
        ({"seed": 1.5}, ["seed=1.5", "type int"]),
        ({"vae_compile": 1}, ["vae_compile=1", "type bool"]),
        ({"learning_rate": None}, ["learning_rate=None", "type float"]),
        ({"decode_workers": "2"}, ["decode_workers='2'", "type int or null"]),
        ({"output_dir": ["a"]}, ["output_dir=['a']", "type str"]),
        ([], ["holds a list, not an object"]),
        ("{", ["not valid JSON", "line 1"]),
        ("\udcff", ["not valid JSON"]),
        (
            {"validation_every_n_steps": 1, "validation_step_interval": 2},
            ["validation_every_n_steps is validation_step_interval", "two values, 1 and 2"],
        ),
        ({"num_validation_videos": "4"}, ["num_validation_images='4'", "type int"]),
        ({"model_type": "lora"}, ["model_type='lora'", "trains all weights", '"full"']),
        ({"model_family": "wan"}, ["model_family='wan'", '"longcat_video"']),
        ({"model_flavour": "x"}, ["model_flavour='x'", '"final"']),
        (
            {"base_model_precision": "int8-quanto"},
            ["base_model_precision='int8-quanto'", "optimizer to an 8-bit one", '"bf16"'],
        ),
        ({"vae_dtype": "fp16"}, ["vae_dtype='fp16'", "bf16, fp32"]),
        ({"vae_chunk_frames": 6}, ["vae_chunk_frames=6", "multiple of 4"]),
        ({"vae_chunk_frames": 0}, ["vae_chunk_frames=0", "above 0"]),
        ({"train_batch_size": 0}, ["train_batch_size=0", "above 0"]),
        ({"decode_workers": 0}, ["decode_workers=0", "above 0"]),
        ({"data_backend_config": None}, ["data_backend_config is needed", "databackend.json"]),
        ({"data_backend_config": ""}, ["data_backend_config is needed"]),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, list) else "",
)
def test_mistakes_in_the_file(tmp_path: Path, content: Any, parts: list[str]) -> None:
    if content == "\udcff":
        path = str(tmp_path / "bytes.json")
        Path(path).write_bytes(b"\xff")
    else:
        path = write(tmp_path, NEEDED | content if isinstance(content, dict) else content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(["--config", path])
    for part in (path, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learning_rat", "1"], ["the command line", "'learning_rat'", "'learning_rate'"]),
        (
            ["--num_validation_videos", "1", "--num_validation_images", "2"],
            ["the command line", "num_validation_videos is num_validation_images", "'1' and '2'"],
        ),
        (["--seed", "x"], ["the command line", "seed='x'", "type int"]),
        (["--seed", "1.5"], ["seed='1.5'", "type int"]),
        (["--seed", "null"], ["seed='null'", "type int"]),
        (["--vae_compile", "yes"], ["vae_compile='yes'", "type bool"]),
        (["--seed", "1", "2"], ["'2' has no key", "--key value"]),
        (["file.json"], ["'file.json' has no key"]),
        (["--config", "missing.json"], ["missing.json", "no such config file", str(Path.cwd())]),
        ([], ["the command line: data_backend_config is needed"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(argv)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["cache_dir_vae", "cache_dir"])
def test_a_cache_is_not_made_in_s3(tmp_path: Path, key: str) -> None:
    videos = {"dataset_type": "video", "instance_data_dir": ".", "cache_dir_vae": "vae"}
    embeds = {"dataset_type": "text_embeds", "cache_dir": "text"}
    (videos if key in videos else embeds)[key] = "s3://bucket/cache"
    (tmp_path / "databackend.json").write_text(json.dumps([videos, embeds]))
    _, data = read_configs(["--config", write(tmp_path, NEEDED)])  # the training reads it there
    with pytest.raises(ValueError, match=r"s3://bucket/cache: .*made in a folder"):
        check_caches_are_folders(data)
    assert main(["--config", write(tmp_path, NEEDED)]) == 2


def test_importing_the_command_loads_nothing_heavy() -> None:
    script = (
        "import sys, longcat_video_fft.precompute.__main__\n"
        f"heavy = {set(HEAVY)} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=launch_env(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        (NEEDED, "{folder}/databackend.json: no such config file ({folder}/databackend.json)."),
    ],
    ids=["training_config", "databackend"],
)
def test_a_mistake_is_one_line_and_soon(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, content)
    argv = [sys.executable, "-X", "importtime", "-m", "longcat_video_fft.precompute"]
    done = subprocess.run(
        [*argv, "--config", path],
        cwd=ROOT, env=launch_env(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines(keepends=True)
    imported = [line for line in lines if line.startswith("import time:")]
    reported = [line for line in lines if line not in imported]
    assert done.returncode == 2, done.stderr
    where = "" if "{folder}" in message else f"{path}: "
    assert reported == [f"error: {where}{message.format(folder=tmp_path)}\n"]
    assert done.stdout == ""
    names = {line.rpartition("|")[2].strip() for line in imported}
    assert "longcat_video_fft.options.config" in names
    assert not names & set(HEAVY)
