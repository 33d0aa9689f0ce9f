"""The plan's command: its flags and their mistakes, DeepSpeed's settings, names of cards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.vss_longcat_omni.support.tiny import tiny_config
from vss_longcat_omni.model.saving import save_config
from vss_longcat_omni.options.run_arguments import RunArguments
from vss_longcat_omni.options.training_arguments import OmniTrainingArguments
from vss_longcat_omni.options.zero_settings import read_zero_settings
from vss_longcat_omni.plan.__main__ import build_parser, check_fits, main, parse_bytes, read_setup
from vss_longcat_omni.plan.inputs import GIB, find_gpu

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_of_the_command_are_the_trainers(tmp_path: Path) -> None:
    save_config(tiny_config(), tmp_path)
    options = build_parser().parse_args(["--model_name_or_path", str(tmp_path)])
    assert build_parser().parse_args([]).model_name_or_path == RunArguments.model_name_or_path
    assert options.ds_config == OmniTrainingArguments.deepspeed
    training = OmniTrainingArguments(output_dir=str(tmp_path), deepspeed="", use_cpu=True)
    training.deepspeed = options.ds_config
    trained = check_fits(RunArguments(), training, tiny_config())
    assert trained is not None
    asked = read_setup(options)
    of_machine = ("sizes", "gpus", "nodes", "gpu", "host_bytes", "nvme_rate", "network_rate")
    for field in dataclasses.fields(asked):
        if field.name not in of_machine:
            assert getattr(asked, field.name) == getattr(trained, field.name), field.name


def test_the_command_is_light_and_quick() -> None:
    code = (
        "import sys; from vss_longcat_omni.plan.__main__ import main\n"
        "status = main('--gpus 16 --gpu h100 --ds_config ds_config_nvme.json'.split())\n"
        "heavy = {'deepspeed', 'peft', 'transformers.trainer'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "16 h100 on 2 nodes" in done.stdout
    assert "from NVMe" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu h999", "--gpu h999: choose one of h200, h100"),
        ("--gpu_memory 80", "--gpu_memory: 80: give a size as 80G"),
        ("--host_ram 0G", "--host_ram: 0G"),
        ("--gpus 0", "--gpus 0: give more than 0"),
        ("--gpus 9 --nodes 2", "gpus=9, nodes=2"),
        ("--max_tokens 0", "--max_tokens 0: give more than 0"),
        ("--nvme_gbps -1", "--nvme_gbps -1.0"),
        ("--ds_config nothing.json", "nothing.json: no such file"),
        ("--model_name_or_path nowhere", "--model_name_or_path nowhere: no such folder"),
    ],
)
def test_mistakes_in_flags_are_named(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_status_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "DOES NOT FIT: a node needs" in capsys.readouterr().out
    assert main(["--host_ram", "2T"]) == 0
    assert capsys.readouterr().out.endswith("It fits.\n")


def test_a_folder_and_an_unknown_card_with_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny_config(), tmp_path)
    options = f"--gpu rtx5090 --gpu_memory 32G --gpus 1 --model_name_or_path {tmp_path}"
    assert main([*options.split(), "--ds_config", ""]) == 0
    text = capsys.readouterr().out
    assert "1 rtx5090" in text
    assert "offload_param" not in text
    assert "seconds" not in text  # its rates are not known
    assert text.endswith("It fits.\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must be a JSON object"),
        ({"offload_param": {"device": "disk"}, "stage": 3}, "offload_param.device='disk'"),
        ({"stage": 3, "reduce_bucket_size": "much"}, "reduce_bucket_size='much'"),
        ({"stage": 3, "offload_param": {"buffer_size": -1}}, "buffer_size=-1"),
        ({"stage": True}, "stage=True"),
    ],
)
def test_mistakes_in_a_deepspeed_config_are_named(
    values: Any, message: str, tmp_path: Path
) -> None:
    text = values if isinstance(values, str) else json.dumps({"zero_optimization": values})
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=r"ds\.json") as error:
        read_zero_settings(str(tmp_path / "ds.json"), 64)
    assert message in str(error.value)


def test_auto_is_what_transformers_puts_there() -> None:
    zero = read_zero_settings("ds_config.json", 6144)
    assert (zero.stage, zero.device, zero.pin_memory) == (3, "cpu", True)
    assert zero.reduce_bucket_size == 6144**2
    assert read_zero_settings(None, 6144).stage == 0


def test_sizes_and_names_of_cards() -> None:
    assert parse_bytes("512G") == parse_bytes("512GiB") == 512 * GIB
    assert parse_bytes("1.5T") == 1.5 * 1024 * GIB
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "b200": "b200"}
    names |= {"NVIDIA A100-SXM4-80GB": "a100-80", "a100-80": "a100-80"}
    for name, expected in names.items():
        assert find_gpu(name).name == expected
    assert find_gpu("NVIDIA H200", 5.0).num_bytes == 5.0
    other = find_gpu("NVIDIA GH200 480GB", 7.0)
    assert (other.num_bytes, other.flops) == (7.0, 0)
