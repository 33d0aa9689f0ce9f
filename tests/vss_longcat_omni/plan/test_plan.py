"""The plan's verdicts, words and command. Memory by hand: test_plan_memory.py."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, tiny_config
from vss_longcat_omni.model.saving import save_config
from vss_longcat_omni.options.run_arguments import RunArguments
from vss_longcat_omni.options.training_arguments import OmniTrainingArguments
from vss_longcat_omni.plan import __main__ as plan_module
from vss_longcat_omni.plan.__main__ import check_fits, plan_run
from vss_longcat_omni.plan.inputs import (
    GIB,
    GPUS,
    RELEASED,
    Machine,
    load_sizes,
    released_config,
)
from vss_longcat_omni.plan.report import describe
from vss_longcat_omni.plan.time import predict_times

if TYPE_CHECKING:
    from pathlib import Path

H200 = GPUS["h200"]
TB = 1024 * GIB


def training_arguments(tmp_path: Path, deepspeed: Any = None, **changes: Any):
    """Without the Trainer's own DeepSpeed set-up, which other tests would see."""
    training = OmniTrainingArguments(
        output_dir=str(tmp_path), deepspeed="", use_cpu=True, report_to=["none"], **changes
    )
    training.deepspeed = deepspeed
    return training


@pytest.fixture(scope="module")
def released_sizes() -> Any:
    return load_sizes(released_config())


@pytest.fixture
def planned(tmp_path: Path, released_sizes: Any, monkeypatch: pytest.MonkeyPatch):
    """plan_run of the defaults on h200s with some other settings of ZeRO."""
    monkeypatch.setattr(plan_module, "load_sizes", lambda config: released_sizes)

    def make(gpus: int, host: float, **zero: Any):
        training = training_arguments(tmp_path, "ds_config.json")
        plan = plan_run(
            RunArguments(), training, released_sizes.config,
            gpus=gpus, nodes=-(-gpus // 8), gpu=H200, gpu_memory=H200.num_bytes, host_memory=host,
        )  # fmt: skip
        return plan.changed(**zero)

    return make


def test_512_gb_cannot_hold_the_offload_and_2_tb_can(planned) -> None:
    (problem,) = planned(8, 512 * GIB).problems
    assert "GB of host memory and has 549.8" in problem
    assert planned(8, 2 * TB).problems == []
    assert planned(16, 1 * TB).problems == []  # half of the weights on each node


def test_8_h200_without_offload_do_not_fit(planned) -> None:
    (problem,) = planned(8, 2 * TB, offload="none").problems
    assert "a GPU needs" in problem
    assert "has 150.1" in problem


def test_16_h200_without_offload_fit_where_experts_are_gathered_once(planned) -> None:
    twice = planned(16, 512 * GIB, offload="none", is_sequential=False)  # DeepSpeed's default
    assert twice.problems
    plan = planned(16, 512 * GIB, offload="none")
    assert plan.problems == []
    assert 115e9 < plan.memory.peak < 125e9


def test_h100s_need_the_offload_and_experts_gathered_once(planned) -> None:
    h100 = Machine(gpus=8, gpu=GPUS["h100"], gpu_bytes=GPUS["h100"].num_bytes, host_bytes=2 * TB)
    plan = planned(8, 2 * TB)
    twice = plan.changed(machine=h100, is_sequential=False)
    assert list(twice.lacks) == ["GPU memory"]
    assert plan.changed(machine=h100).problems == []


def test_buffers_for_nvme_must_hold_the_largest_part(planned) -> None:
    nvme = {"offload": "nvme", "buffer_count": 5, "buffer_size": 2e9}
    assert planned(8, 512 * GIB, **nvme).problems == []
    (problem,) = planned(4, 512 * GIB, **nvme).problems
    assert "buffer_size=2e+09 is below the 3,221,225,472 elements" in problem


def test_times_by_hand(planned) -> None:
    times = planned(8, 2 * TB).times
    assert times["from host memory"] == pytest.approx(3 * 1125.118 / 8 / 55, rel=1e-3)
    assert times["all-gather"] == pytest.approx(3 * 1125.118 * 7 / 8 / 234, rel=1e-3)
    # 27 tensors a layer, and two for each of the 5 + 3 targets of its two halves.
    assert times["DeepSpeed's own work"] == pytest.approx(3 * 28 * (27 + 32) * 0.7e-3)
    # 2 x 17.53B dense and, of 12 picks, 8 real experts of 37.75M in 28 layers; 56 attentions over
    # half of 8192^2 with 64 heads x (192 + 128).
    dense = 3 * 2 * (560.665 - 541.166 - 0.805) * 8192 / 701e3
    experts = 3 * 28 * 2 * 8 * 37.7487e-3 * 8192 / 379e3
    attention = 4.5 * 56 * 8192**2 * 64 * 320 / 1e9 / 360e3
    assert times["compute"] == pytest.approx(dense + experts + attention, rel=1e-3)
    assert times.slowest == pytest.approx(sum(term.seconds for term in times.terms))
    assert times.fastest == times["all-gather"]
    assert times.tokens_per_sec == pytest.approx(8 * 8192 / times.slowest)
    assert planned(8, 2 * TB, offload="nvme").times["from NVMe"] == pytest.approx(482.2, rel=1e-3)
    assert planned(8, 2 * TB, is_sequential=True).times["copies"] == 0


def test_a_gpu_almost_full_is_told(planned) -> None:
    plan = planned(8, 2 * TB)
    for share, is_told in ((0.8, False), (0.9, True), (1.1, False)):
        size = int(plan.memory.needed / share)
        machine = dataclasses.replace(plan.machine, gpu_bytes=size)
        text = describe(dataclasses.replace(plan, machine=machine))
        assert ("give memory back" in text) == is_told, share


def test_a_network_slower_than_nvlink_bounds_the_gathers(planned) -> None:
    plan = planned(16, 2 * TB)
    slow = dataclasses.replace(plan.machine, network_rate=50e9)
    times = predict_times(plan.job, plan.sizes, slow)
    assert times is not None
    assert times["all-gather"] == pytest.approx(3 * 1125.118 * 15 / 16 / 50, rel=1e-3)


def test_the_words_say_what_the_source_document_has_wrong(planned) -> None:
    text = describe(planned(8, 512 * GIB))
    for words in (
        "512 GB of host memory cannot hold the offloaded weights: they are 1,125.1 GB",
        "1.2 to 1.6 TB",
        "8 H200 without offload: 140.6 GB of weights a GPU",
        "that does not fit either",
        "stage3_max_live_parameters 1e9 does not bound",
        "512 x 4096 x 6144 = 12,884,901,888 elements, 25.8 GB",
        "12.88e9 elements and is gathered whole",
        "1,121.3 GB",
        "205.6M",
        "estimates",
        "DOES NOT FIT: a node needs",
    ):
        assert words in text
    asked = [line for line in text.splitlines() if line.endswith("<- asked")]
    assert len(asked) == 1
    assert "8 h200, offload cpu" in asked[0]
    for name in ("8 h200", "16 h200 on 2 nodes", "8 h100", "16 h100 on 2 nodes"):
        for offload in ("none", "cpu", "nvme"):
            assert f"  {name}, offload {offload} " in text
    assert describe(planned(8, 2 * TB)).endswith("It fits.")


def test_a_tiny_model_on_cpus_fits_and_is_told_without_gpus(tmp_path: Path) -> None:
    config = tiny_config(vision_config=VISION, audio_config=AUDIO)
    for deepspeed in (None, "ds_config.json", "ds_config_nvme.json"):
        training = training_arguments(tmp_path, deepspeed)
        plan = plan_run(
            RunArguments(tuning="full"), training, config,
            gpus=2, gpu_memory=None, host_memory=16 * GIB,
        )  # fmt: skip
        assert plan.problems == []
        assert plan.times is None
        text = describe(plan)
        assert "2 processes on CPUs" in text
        assert "512 GB" not in text


def test_check_fits_refuses_what_does_not_fit_and_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = training_arguments(tmp_path, "ds_config.json")
    config = tiny_config()
    plan = check_fits(RunArguments(), training, config)
    assert plan is not None
    assert plan.machine.gpus == 1
    assert plan.machine.gpu_bytes is None
    monkeypatch.setattr(plan_module, "host_memory", lambda: 1 << 14)
    with pytest.raises(ValueError, match="host memory") as error:
        check_fits(RunArguments(), training, config)
    assert "--force" in str(error.value)
    assert "No other setting fits" in str(error.value)
    check_fits(RunArguments(force=True), training, config)
    assert "host memory" in caplog.text


def test_check_fits_names_the_settings_that_fit(planned) -> None:
    message = plan_module.refusal(planned(8, 512 * GIB))
    assert message.startswith("this run does not fit on 8 h200: a node needs")
    assert "What would fit: offload_param nvme" in message
    assert "offload_param cpu;" not in message


def test_check_fits_looks_at_folders_and_the_released_model_before_a_download(
    tmp_path: Path, released_sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_arguments(tmp_path, "ds_config.json")
    assert check_fits(RunArguments(model_name_or_path="someone/else"), training) is None
    save_config(tiny_config(), tmp_path / "model")
    plan = check_fits(RunArguments(model_name_or_path=str(tmp_path / "model")), training)
    assert plan is not None
    assert plan.sizes.config.hidden_size == tiny_config().hidden_size
    monkeypatch.setattr(plan_module, "load_sizes", lambda config: released_sizes)
    monkeypatch.setattr(plan_module, "host_memory", lambda: 512 * GIB)
    with pytest.raises(ValueError, match=r"host memory and has 549\.8"):
        check_fits(RunArguments(model_name_or_path=RELEASED), training)


def test_nodes_come_from_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_arguments(tmp_path)
    monkeypatch.setattr(OmniTrainingArguments, "world_size", 16)
    monkeypatch.setenv("LOCAL_SIZE", "8")  # DeepSpeed's launcher; torchrun: LOCAL_WORLD_SIZE
    plan = check_fits(RunArguments(), training, tiny_config())
    assert plan is not None
    assert (plan.machine.gpus, plan.machine.nodes) == (16, 2)
