"""Settings of a run from flags, files and the environment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from vss_longcat_omni.options.training_arguments import parse_arguments
from vss_longcat_omni.training.signals import notice_locks

if TYPE_CHECKING:
    from pathlib import Path

    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

VARIABLES = ("PUSH_TO_HUB", "HF_USER", "HF_TOKEN", "WANDB_API_KEY", "HF_HUB_ENABLE_HF_TRANSFER")
MODULE = "vss_longcat_omni.options.training_arguments"
TRACKERS = ["tensorboard", "wandb", "trackio"]
ARGV = ("--deepspeed", "", "--bf16", "false", "--use_cpu", "true")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(f"{MODULE}.get_token", lambda: None)


def parse(*argv: str) -> OmniTrainingArguments:
    return parse_arguments([*ARGV, *argv])[1]


def test_the_documents_values_are_the_defaults() -> None:
    run, training = parse_arguments(list(ARGV))
    assert (run.lora_r, run.lora_alpha, run.lora_dropout) == (32, 64, 0.05)
    wanted: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 32,
        "learning_rate": 1e-4,
        "warmup_steps": 0.03,
        "gradient_checkpointing": True,
        "output_dir": "longcat-flash-omni-vss-lora",
        "push_to_hub": False,
        "report_to": ["tensorboard"],
    }
    assert {name: getattr(training, name) for name in wanted} == wanted
    assert training.lr_scheduler_type == "cosine"


def test_the_environment_asks_for_uploads_and_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSH_TO_HUB", "true")
    with pytest.raises(ValueError, match="PUSH_TO_HUB needs HF_TOKEN"):
        parse()
    monkeypatch.setattr(f"{MODULE}.get_token", lambda: "hf_x")
    monkeypatch.setenv("HF_USER", "me")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setattr(f"{MODULE}.get_available_reporting_integrations", lambda: TRACKERS)
    training = parse("--output_dir", "runs/mine")
    assert (training.push_to_hub, training.hub_model_id) == (True, "me/mine")
    assert training.report_to == ["tensorboard", "wandb"]
    monkeypatch.setenv("PUSH_TO_HUB", "false")
    assert not parse().push_to_hub


def test_several_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(f"{MODULE}.get_available_reporting_integrations", lambda: TRACKERS)
    assert parse("--report_to", "wandb", "trackio").report_to == ["wandb", "trackio"]
    assert parse("--report_to", "none").report_to == []
    path = tmp_path / "run.json"
    path.write_text('{"report_to": ["tensorboard", "wandb"]}')
    assert parse("--config", str(path)).report_to == ["tensorboard", "wandb"]


def test_a_tracker_that_cannot_be_is_reported_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"report_to: tensorbord is not supported, only .*wandb"):
        parse("--report_to", "tensorbord")
    monkeypatch.setattr(f"{MODULE}.get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=r"report_to: trackio is not installed\. `pip install"):
        parse("--report_to", "trackio")


def test_a_variable_without_effect_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", "1")
    parse()
    assert "set HF_XET_HIGH_PERFORMANCE=1" in caplog.text


def test_a_lock_that_a_killed_build_left_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    notice_locks()
    assert not caplog.text
    lock = tmp_path / "py311_cu130" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    notice_locks()
    assert f"{lock}: an operator of DeepSpeed is being built" in caplog.text


def test_older_names_get_the_newer_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--warmup_ratio: no such option; it became warmup_steps"):
        parse("--warmup_ratio", "0.03")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"evaluation_strategy": "epoch"}))
    message = r"run\.json: evaluation_strategy: no such option; it became eval_strategy"
    with pytest.raises(ValueError, match=message):
        parse("--config", str(path))
    with pytest.raises(ValueError, match="no such option"):
        parse("--lora_rank", "8")
    with pytest.raises(ValueError, match="'word': options begin with --"):
        parse("word")
