"""Configs: unknown keys, types, values that cannot work and why, batch arithmetic, and how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_omni.options.config import TYPES, TrainConfig, load_config
from llama_omni.options.rules import validate_config

FOLDER = Path(__file__).parents[3] / "llama_omni"
CONFIGS = sorted((FOLDER / "configs").glob("*_config.json"))
RUN_CONFIGS = [path for path in CONFIGS if not path.name.startswith("ds_")]
STAGE_CONFIGS = [FOLDER / "configs" / f"stage{stage}_config.json" for stage in (1, 2)]
# Section 1.8 of the facts about the source document's project: its first-commit defaults.
SOURCE_DOCUMENT_KEYS = [
    "stage",
    "data_path",
    "validation_data_path",
    "resume_from_checkpoint",
    "output_dir",
    "model_name_or_path",
    "version",
    "freeze_backbone",
    "tune_speech_projector",
    "tune_speech_encoder",
    "tune_speech_generator_only",
    "pretrain_speech_projector",
    "speech_encoder_type",
    "speech_encoder",
    "speech_encoder_ds_rate",
    "speech_encoder_hidden_size",
    "speech_projector_type",
    "speech_generator_type",
    "ctc_decoder_config",
    "ctc_upsample_factor",
    "ctc_loss_weight",
    "unit_vocab_size",
    "is_multimodal",
    "input_type",
    "speech_normalize",
    "mel_size",
    "has_tgt_units",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "lr_scheduler_type",
    "max_grad_norm",
    "speech_projector_lr",
    "evaluation_strategy",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "run_name",
    "remove_unused_columns",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "stage1_model_path",
    "kmeans_model_path",
    "bf16",
    "fp16",
    "gradient_checkpointing",
]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A stage-1 config that nothing is wrong with."""
    return {
        "stage": 1,
        "data_path": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": "org/llama",
        "speech_encoder": "org/whisper",
    }


@pytest.fixture
def stage2_options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    return {
        "stage": 2,
        "data_path": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "stage1_model_path": str(tmp_path),
        "kmeans_model_path": "km.bin",
        "freeze_backbone": True,
        "tune_speech_generator_only": True,
    }


def write(folder: Path, content: Any) -> str:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_every_key_of_the_source_document_is_known() -> None:
    assert set(SOURCE_DOCUMENT_KEYS) <= set(TYPES)


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_parse(path: Path) -> None:
    config = load_config([str(path)])
    assert set(json.loads(path.read_text())) <= set(TYPES)
    config.grad_accum_steps(1)


@pytest.mark.parametrize("path", STAGE_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize(("devices", "accum"), [(1, 4), (2, 2), (4, 1)])
def test_shipped_configs_reach_the_papers_batch(path: Path, devices: int, accum: int) -> None:
    config = load_config([str(path)])
    assert config.grad_accum_steps(devices) == accum
    assert config.batch_arithmetic(devices) == (
        f"global batch 32 = 8 a device x {devices} device(s) x {accum} accumulation step(s)"
    )


def test_shipped_configs_are_valid_with_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    paths = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path)]
    validate_config(load_config([str(STAGE_CONFIGS[0]), *paths]))
    model = ["--stage1_model_path", str(tmp_path), "--kmeans_model_path", "km.bin"]
    validate_config(load_config([str(STAGE_CONFIGS[1]), *paths, *model]))


def test_command_line_wins(tmp_path: Path) -> None:
    file = write(tmp_path, {"learning_rate": 1e-3, "seed": 1, "bf16": True, "run_name": "a"})
    config = load_config(
        [file, "--learning_rate", "1e-5", "--seed=7", "--bf16", "false", "--run_name", "null",
         "--tune_speech_encoder", "--max_steps", "-1", "--num_train_epochs", "2"]
    )  # fmt: skip
    assert (config.learning_rate, config.seed, config.bf16) == (1e-5, 7, False)
    assert config.run_name is None
    assert config.tune_speech_encoder is True
    assert config.max_steps == -1
    assert config.num_train_epochs == 2.0
    assert config.source == file
    assert load_config([file]).learning_rate == 1e-3


def test_the_launchers_own_argument_is_ignored() -> None:
    assert load_config(["--local_rank=1", "--seed", "3"]) == load_config(["--seed", "3"])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learning_rat", "1"], ["the command line", "'learning_rat'", "'learning_rate'"]),
        (["--ctc_upsampling", "1"], ["'ctc_upsampling'", "Did you mean 'ctc_upsample_factor'"]),
        (["--zzzz", "1"], ["'zzzz'", "README.md"]),
        (["--seed", "x"], ["seed='x'", "must be of type int"]),
        (["--seed", "1.5"], ["seed='1.5'", "int"]),
        (["--bf16", "yes"], ["bf16='yes'", "bool"]),
        (["--stage", "null"], ["stage='null'", "int"]),
        (["--seed", "1", "2"], ["'2' has no key"]),
        (["missing.json"], ["missing.json", "no such config file"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(argv)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"warmup_ration": 0.1}, ["unknown key 'warmup_ration'", "'warmup_ratio'"]),
        ({"seed": "7"}, ["seed='7'", "int"]),
        ({"seed": True}, ["seed=True", "int"]),
        ({"bf16": 1}, ["bf16=1", "bool"]),
        ({"learning_rate": None}, ["learning_rate=None", "float"]),
        ({"source": "x"}, ["unknown key 'source'"]),
        ([], ["list", "not an object"]),
        ("{", ["not valid JSON", "line 1"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: Any, parts: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_config([path])
    for part in (path, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"fp16": True}, ["fp16=True is unsupported", "overflows", "bf16"]),
        ({"version": "v1"}, ["version='v1'", "v0"]),
        ({"is_multimodal": False}, ["is_multimodal=False", "set it to true"]),
        ({"input_type": "raw"}, ["input_type='raw'", "log-mel"]),
        ({"speech_normalize": True}, ["speech_normalize=True", "waveforms"]),
        ({"remove_unused_columns": True}, ["remove_unused_columns=True", "set it to false"]),
        ({"optimizer_precision": "bf16"}, ["optimizer_precision='bf16'", "round away", "8bit"]),
        ({"optimizer_precision": "8bit", "bf16": False}, ["low-precision", "fp32_master"]),
        ({"optimizer_precision": "int4"}, ["optimizer_precision='int4'", "bf16_stochastic"]),
        ({"stage": 3}, ["stage=3", "1, 2"]),
        ({"speech_encoder_type": "hubert"}, ["speech_encoder_type='hubert'", "whisper"]),
        ({"speech_projector_type": "mlp"}, ["speech_projector_type='mlp'", "linear"]),
        ({"speech_generator_type": "ar"}, ["speech_generator_type='ar'", "ctc"]),
        ({"ctc_infeasible": "hide"}, ["ctc_infeasible='hide'", "stretch, drop"]),
        ({"lr_scheduler_type": "step"}, ["lr_scheduler_type='step'", "cosine"]),
        ({"evaluation_strategy": "often"}, ["evaluation_strategy='often'", "no, steps, epoch"]),
        ({"save_strategy": "often"}, ["save_strategy='often'"]),
        ({"report_to": "mlflow"}, ["report_to='mlflow'", "trackio"]),
        ({"parallel": "fsdp"}, ["parallel='fsdp'", "fsdp2"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0 must be above 0"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size=0"]),
        ({"global_batch_size": -1}, ["global_batch_size=-1"]),
        ({"warmup_ratio": 1.0}, ["warmup_ratio=1.0", "below 1"]),
        ({"lora_dropout": -0.1}, ["lora_dropout=-0.1"]),
        ({"weight_decay": -1.0}, ["weight_decay=-1.0", "negative"]),
        ({"max_steps": 0}, ["max_steps=0"]),
        ({"ctc_decoder_config": "(2,30,4,8)"}, ["ctc_decoder_config", "multiple of heads"]),
        ({"ctc_decoder_config": "two"}, ["ctc_decoder_config='two'"]),
        ({"data_path": None}, ["data_path=null", "stage 1 needs it"]),
        ({"data_path": "nowhere"}, ["data_path='nowhere'", "no such file"]),
        ({"validation_data_path": "nowhere"}, ["validation_data_path='nowhere'"]),
        ({"output_dir": None}, ["output_dir=null"]),
        ({"model_name_or_path": None}, ["model_name_or_path=null"]),
        ({"speech_encoder": None}, ["speech_encoder=null"]),
        ({"tune_speech_generator_only": True}, ["tune_speech_generator_only=true", "stage 2"]),
        ({"has_tgt_units": True}, ["has_tgt_units=true", "stage 2"]),
        ({"lora_enable": True, "freeze_backbone": True}, ["contradict each other"]),
        ({"tune_speech_projector": True, "lora_enable": True}, ["the projector alone"]),
        ({"tune_speech_projector": True, "tune_speech_encoder": True}, ["the projector alone"]),
        ({"parallel": "deepspeed"}, ["needs --deepspeed FILE"]),
        ({"deepspeed": __file__, "parallel": "ddp"}, ["contradicts parallel='ddp'"]),
        ({"deepspeed": __file__, "optimizer_precision": "8bit"}, ["unsupported with DeepSpeed"]),
        ({"deepspeed": "nowhere.json"}, ["deepspeed='nowhere.json'", "no such file"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_values_that_cannot_work(
    options: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    validate_config(TrainConfig(**options))
    with pytest.raises(ValueError, match=r".") as caught:
        validate_config(TrainConfig(**options | changes, source="my.json"))
    for part in ("my.json: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"stage1_model_path": None}, ["stage1_model_path=null", "stage 2 needs it"]),
        ({"stage1_model_path": "./no/such"}, ["no model there", "Run stage 1 first"]),
        ({"kmeans_model_path": None}, ["kmeans_model_path=null"]),
        ({"freeze_backbone": False}, ["freeze_backbone=false", "set it to true"]),
        ({"tune_speech_generator_only": False}, ["tune_speech_generator_only=false"]),
        ({"lora_enable": True}, ["lora_enable=true", "stage 1"]),
        ({"tune_speech_projector": True}, ["tune_speech_projector=true", "stage 1"]),
        ({"tune_speech_encoder": True}, ["tune_speech_encoder=true", "stage 1"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_unsupported_in_stage_2(
    stage2_options: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    validate_config(TrainConfig(**stage2_options))
    with pytest.raises(ValueError, match=r".") as caught:
        validate_config(TrainConfig(**stage2_options | changes))
    for part in parts:
        assert part in str(caught.value)


def test_accelerates_first_fsdp_is_unsupported(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        validate_config(TrainConfig(**options))


def test_batch_arithmetic() -> None:
    plain = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert plain.grad_accum_steps(2) == 3
    assert plain.batch_arithmetic(2).startswith("global batch 24 = 4 a device x 2")
    assert TrainConfig(global_batch_size=32).grad_accum_steps(2) == 2
    with pytest.raises(ValueError, match=r"32 is not a multiple of .*=8 x 3"):
        TrainConfig(global_batch_size=32).grad_accum_steps(3)
    # The source document: 32 a device, while the paper's global batch is 32.
    with pytest.raises(ValueError, match="Set per_device_train_batch_size to a divisor of 8"):
        TrainConfig(global_batch_size=32, per_device_train_batch_size=32).grad_accum_steps(4)
    both = TrainConfig(global_batch_size=32, gradient_accumulation_steps=1)
    assert both.grad_accum_steps(4) == 1
    with pytest.raises(ValueError, match="contradicts global_batch_size=32, which needs 4"):
        both.grad_accum_steps(1)


def test_mistakes_are_reported_before_anything_heavy_loads() -> None:
    script = (
        "import sys\n"
        "from llama_omni.train import main\n"
        "code = main(['--learning_rat', '1'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=FOLDER.parent, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: the command line: unknown key 'learning_rat'. Did you mean 'learning_rate'?\n"
    )
