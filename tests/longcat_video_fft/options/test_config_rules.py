"""Every key of the training works or is an error with a reason; so does every accelerate flag."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from longcat_video_fft.model import transformer
from longcat_video_fft.options import config_rules
from longcat_video_fft.options.config import FIELDS, TrainConfig
from longcat_video_fft.options.config_rules import (
    check_model,
    check_world,
    parse_resolution,
    validate_config,
)
from longcat_video_fft.options.launcher_rules import check_launcher
from longcat_video_fft.options.load import load_config
from tests.longcat_video_fft.support.tiny import ROOT, launch_env

if TYPE_CHECKING:
    from pathlib import Path

# The values of the source document's training_config.json, its older and its optional keys too.
SOURCE_DOCUMENT: dict[str, Any] = {
    "learning_rate": 1e-5, "lr_scheduler": "cosine", "lr_warmup_steps": 500,
    "max_train_steps": 30000, "checkpointing_steps": 2500, "checkpoints_total_limit": 5,
    "train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True,
    "optimizer": "adamw_bf16", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "fsdp_enable": True, "fsdp_version": 2,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_cpu_ram_efficient_loading": True,
    "validation_resolution": "480x832", "validation_num_video_frames": 93,
    "validation_num_inference_steps": 40, "validation_guidance": 4.0,
    "report_to": "tensorboard", "musubi_blocks_to_swap": 4, "musubi_block_swap_device": "cpu",
}  # fmt: skip


def config(**values: Any) -> TrainConfig:
    made = TrainConfig(data_backend_config="databackend.json", source="run.json", **values)
    validate_config(made)
    return made


@pytest.mark.parametrize(
    "intervals",
    [
        {"validation_every_n_steps": 1000, "num_validation_videos": 4},
        {"validation_step_interval": 1000, "num_validation_images": 4},
    ],
    ids=["older", "newer"],
)
def test_the_source_documents_keys_are_taken(tmp_path: Path, intervals: dict[str, int]) -> None:
    path = tmp_path / "training_config.json"
    own = {"data_backend_config": "databackend.json"}
    path.write_text(json.dumps(SOURCE_DOCUMENT | own | intervals))
    read = load_config(["--config", str(path)])
    for key, value in SOURCE_DOCUMENT.items():
        assert getattr(read, key) == value, key
    assert (read.validation_step_interval, read.num_validation_images) == (1000, 4)


def test_older_names_on_the_command_line() -> None:
    argv = ["--data_backend_config", "d.json", "--validation_every_n_steps", "7"]
    assert load_config(argv).validation_step_interval == 7
    with pytest.raises(ValueError, match=r"validation_every_n_steps is validation_step_interval"):
        load_config([*argv, "--validation_step_interval", "8"])


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"base_model_precision": "int8-quanto"}, ["'int8-quanto'", '"adamw_8bit"', '"bf16"']),
        ({"fsdp_version": 1}, ["fsdp_version=1", "fully_shard", "set it to 2"]),
        ({"fsdp_state_dict_type": "FULL_STATE_DICT"}, ["export", '"SHARDED_STATE_DICT"']),
        ({"fsdp_auto_wrap_policy": "NO_WRAP"}, ["one unit", '"TRANSFORMER_BASED_WRAP"']),
        ({"fsdp_cpu_ram_efficient_loading": False}, ["own slices", "set it to true"]),
        ({"musubi_block_swap_device": "cuda"}, ["pinned CPU memory", '"cpu"']),
        ({"optimizer": "lion"}, ["optimizer='lion'", "adamw_bf16, adamw, adamw_8bit"]),
        ({"lr_scheduler": "sine"}, ["lr_scheduler='sine'", "cosine, linear"]),
        ({"attention_mechanism": "sageattention"}, ["diffusers, cudnn, flash, flash4, math"]),
        ({"attention_mechanism": "flash4"}, ["not installed", "flash-attn-4"]),
        ({"gradient_checkpointing_mode": "x"}, ["selective, selective_ffn, full"]),
        ({"transformer_init": "zeros"}, ["pretrained, random"]),
        ({"timestep_sampling": "beta"}, ["logit_normal, uniform"]),
        ({"report_to": "comet_ml"}, ["none, tensorboard, wandb, trackio"]),
        ({"mixed_precision": "fp16"}, ["mixed_precision='fp16'", '"bf16"']),
        ({"mixed_precision": "fp8"}, ["mixed_precision='fp8'", "fp8_linears to true"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "above 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate=nan", "above 0"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm=0.0", "above 0"]),
        ({"checkpoints_total_limit": 0}, ["checkpoints_total_limit=0", "above 0"]),
        ({"gpu_memory_gib": 0.0}, ["gpu_memory_gib=0.0", "above 0"]),
        ({"max_text_tokens": 513}, ["max_text_tokens=513", "at most 512"]),
        ({"lr_warmup_steps": -1}, ["lr_warmup_steps=-1", "not be negative"]),
        ({"musubi_blocks_to_swap": -1}, ["musubi_blocks_to_swap=-1", "not be negative"]),
        ({"caption_dropout_probability": 1.1}, ["caption_dropout_probability=1.1", "from 0 to 1"]),
        ({"condition_noise_max": -0.1}, ["condition_noise_max=-0.1", "from 0 to 1"]),
        ({"adam_beta2": 1.0}, ["adam_beta2=1.0", "below 1"]),
        ({"ema_decay": 1.0}, ["ema_decay=1.0", "null"]),
        (
            {"image_to_video_probability": 0.6, "continuation_probability": 0.5},
            ["image_to_video_probability=0.6", "continuation_probability=0.5", "1.1", "lower one"],
        ),
        ({"mixed_precision": "no"}, ["optimizer='adamw_bf16'", 'set optimizer to "adamw"']),
        (
            {"mixed_precision": "no", "optimizer": "adamw", "fp8_linears": True},
            ["fp8_linears=true", 'mixed_precision to "bf16"'],
        ),
        (
            {"gradient_checkpointing": False, "uncheckpointed_blocks": 2},
            ["uncheckpointed_blocks=2", "gradient_checkpointing=false"],
        ),
        (
            {"activation_offload_blocks": 2, "compile": False},
            ["activation_offload_blocks=2", "set compile to true"],
        ),
        ({"fsdp_enable": False, "musubi_blocks_to_swap": 4}, ["musubi_blocks_to_swap=4", "true"]),
        ({"fsdp_enable": False, "fsdp_replicate_size": 2}, ["fsdp_replicate_size=2 needs FSDP"]),
        ({"validation_num_video_frames": 90}, ["validation_num_video_frames=90", "4n + 1"]),
        ({"validation_num_video_frames": 97}, ["at most 93"]),
        ({"validation_resolution": "480p"}, ["validation_resolution='480p'", "HEIGHTxWIDTH"]),
        ({"validation_resolution": "480x830"}, ["multiples of 16"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_an_error(values: dict[str, Any], parts: list[str]) -> None:
    assert values.keys() <= FIELDS.keys()
    with pytest.raises(ValueError, match=r"^run\.json: ") as caught:
        config(**values)
    for part in parts:
        assert part in str(caught.value)


def test_the_block_is_the_models() -> None:
    """The rules have a copy of the name, since they import nothing heavy."""
    assert transformer.LongCatSingleStreamBlock.__name__ == config_rules.BLOCK_CLASS


def test_resolution_is_height_by_width() -> None:
    assert parse_resolution("480x832") == (480, 832)


def test_rules_load_nothing_heavy() -> None:
    script = (
        "import sys; from longcat_video_fft.options import config_rules, launcher_rules\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=launch_env(), check=True)


def test_batch_arithmetic() -> None:
    world = check_world(config(), 8)
    assert (world.dp_size, world.shard_size, world.global_batch) == (8, 8, 32)
    made = config(context_parallel_size=2, fsdp_replicate_size=2, train_batch_size=3)
    world = check_world(made, 16)
    assert (world.dp_size, world.shard_size, world.replicate_size) == (8, 8, 2)
    assert world.global_batch == 3 * 4 * 8
    alone = check_world(config(fsdp_enable=False), 1)
    assert (alone.shard_size, alone.global_batch) == (1, 4)


@pytest.mark.parametrize(
    ("values", "world_size", "parts"),
    [
        ({"fsdp_enable": False}, 2, ["fsdp_enable=false with 2 devices", "one process"]),
        ({"context_parallel_size": 3}, 8, ["context_parallel_size=3", "8 devices", "1, 2, 4, 8"]),
        ({"fsdp_replicate_size": 3}, 4, ["fsdp_replicate_size=3", "4 devices", "1, 2, 4"]),
        (
            {"fsdp_replicate_size": 4, "context_parallel_size": 4},
            8,
            ["fsdp_replicate_size=4 x context_parallel_size=4 = 16", "8 devices"],
        ),
    ],
)
def test_sizes_that_do_not_divide(
    values: dict[str, Any], world_size: int, parts: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^run\.json: ") as caught:
        check_world(config(**values), world_size)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"context_parallel_size": 5}, ["context_parallel_size=5", "32 heads", "1, 2, 4, 8"]),
        ({"musubi_blocks_to_swap": 49}, ["musubi_blocks_to_swap=49", "48 blocks"]),
        ({"uncheckpointed_blocks": 49}, ["uncheckpointed_blocks=49", "48 blocks"]),
        ({"activation_offload_blocks": 49}, ["activation_offload_blocks=49", "48 blocks"]),
    ],
)
def test_what_does_not_go_with_the_model(values: dict[str, Any], parts: list[str]) -> None:
    released = {"num_heads": 32, "depth": 48}
    check_model(config(**dict.fromkeys(values, 1)), released)
    with pytest.raises(ValueError, match=r"^run\.json: ") as caught:
        check_model(config(**values), released)
    for part in parts:
        assert part in str(caught.value)


def launcher_environment(*flags: str, folder: Path) -> dict[str, str]:
    """Returns what a program finds that the real `accelerate launch` starts with these flags."""
    program = folder / "program.py"
    program.write_text("import json, os; print('ENV' + json.dumps(dict(os.environ)))")
    home = {"HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *flags]
    done = subprocess.run(
        [*argv, str(program)], env={**os.environ, **home}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ENV")]
    return json.loads(line[3:])


SHARDED = ("--use_fsdp", "--fsdp_version", "2", "--main_process_port", "0")
TOPOLOGY = str(ROOT / "longcat_video_fft" / "scripts/accelerate_fsdp2.yaml")


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision=bf16",),
        ("--config_file", TOPOLOGY, "--main_process_port", "0"),
        (*SHARDED, "--fsdp_activation_checkpointing", "true"),
    ],
    ids=["documented", "topology", "fsdp"],
)
def test_the_real_launchers_flags_agree(flags: tuple[str, ...], tmp_path: Path) -> None:
    check_launcher(config(), launcher_environment(*flags, folder=tmp_path))


def test_what_is_not_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = launcher_environment("--use_fsdp", *SHARDED[3:], folder=tmp_path)
    with caplog.at_level("INFO"):
        check_launcher(config(), environment)
    (line,) = caplog.messages
    assert "FSDP_OFFLOAD_PARAMS" in line
    assert line.endswith("are not read: run.json decides")
    assert "ACCELERATE_USE_FSDP" not in line
    caplog.clear()
    check_launcher(config(), {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert not caplog.messages


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("values", "environment"),
    [
        ({}, {}),
        ({}, {"FSDP_VERSION": "1"}),  # not read
        ({"mixed_precision": "no", "optimizer": "adamw"}, {"ACCELERATE_MIXED_PRECISION": "no"}),
        ({}, {"ACCELERATE_MIXED_PRECISION": "no"}),  # accelerate's default
        ({"fsdp_reshard_after_forward": False}, FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
        ({"fsdp_reshard_after_forward": False}, FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "true"}),
        ({"context_parallel_size": 4}, PARALLEL | {"PARALLELISM_CONFIG_CP_SIZE": "4",
                                                   "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}),
    ],
)  # fmt: skip
def test_flags_that_agree(values: dict[str, Any], environment: dict[str, str]) -> None:
    check_launcher(config(**values), environment)


@pytest.mark.parametrize(
    ("values", "environment", "parts"),
    [
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, ["DEEPSPEED", "scripts/accelerate_fsdp2.yaml"]),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "FSDP 2"]),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["=fp16", "mixed_precision='bf16'"]),
        (
            {"mixed_precision": "no", "optimizer": "adamw"},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            ["ACCELERATE_MIXED_PRECISION=bf16", "mixed_precision='no'", "run.json"],
        ),
        (
            {},
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
            ["STEPS=2", "gradient_accumulation_steps=4"],
        ),
        ({"fsdp_enable": False}, FSDP, ["ACCELERATE_USE_FSDP=true", "fsdp_enable=False"]),
        ({}, PARALLEL | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, ["context_parallel_size=1"]),
        (
            {"fsdp_replicate_size": 2},
            PARALLEL | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"},
            ["SIZE=4 contradicts fsdp_replicate_size=2"],
        ),
    ],
    ids=lambda value: "",
)
def test_flags_that_contradict(
    values: dict[str, Any], environment: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^accelerate launch: ") as caught:
        check_launcher(config(**values), environment)
    for part in parts:
        assert part in str(caught.value)
