"""The plan's verdicts, screen and command. Memory by hand: test_plan_memory.py."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, tiny_config
from vss_longcat_omni.model.loading import RELEASED, find_config
from vss_longcat_omni.model.saving import save_config
from vss_longcat_omni.model.sizes import ModelSizes
from vss_longcat_omni.options.run_arguments import RunArguments
from vss_longcat_omni.options.training_arguments import OmniTrainingArguments
from vss_longcat_omni.options.zero_settings import read_zero_settings
from vss_longcat_omni.plan import __main__ as plan_module
from vss_longcat_omni.plan.__main__ import check_fits
from vss_longcat_omni.plan.inputs import GIB, GPUS, Setup
from vss_longcat_omni.plan.memory import predict_memory
from vss_longcat_omni.plan.time import predict_times
from vss_longcat_omni.plan.verdict import alternatives, describe, find_problems, speed

if TYPE_CHECKING:
    from pathlib import Path

TB = 1024 * GIB


def training_arguments(tmp_path: Path, deepspeed: Any = None, **changes: Any):
    """Without the Trainer's own DeepSpeed set-up, which other tests would see."""
    training = OmniTrainingArguments(
        output_dir=str(tmp_path), deepspeed="", use_cpu=True, report_to=["none"], **changes
    )
    training.deepspeed = deepspeed
    return training


@pytest.fixture(scope="module")
def released_sizes() -> ModelSizes:
    config = find_config(RELEASED)
    assert config is not None
    return ModelSizes.of(config)


@pytest.fixture
def planned(released_sizes: ModelSizes):
    """The defaults on h200s with some other settings of ZeRO."""

    def make(gpus: int, host: float, gpu: str = "h200", **zero: Any) -> Setup:
        return Setup(
            sizes=released_sizes, run=RunArguments(),
            zero=replace(read_zero_settings("ds_config.json", 6144), **zero),
            gpus=gpus, nodes=-(-gpus // 8), gpu=GPUS[gpu], host_bytes=host,
        )  # fmt: skip

    return make


def test_512_gb_cannot_hold_the_offload_and_2_tb_can(planned) -> None:
    (problem,) = find_problems(planned(8, 512 * GIB))
    assert "GB of host memory and has 549.8" in problem
    assert find_problems(planned(8, 2 * TB)) == []
    assert find_problems(planned(16, 1 * TB)) == []  # half of the weights on each node


def test_8_h200_without_offload_do_not_fit(planned) -> None:
    (problem,) = find_problems(planned(8, 2 * TB, device="none"))
    assert "a GPU needs" in problem
    assert "has 150.1" in problem


def test_16_h200_without_offload_fit_where_experts_are_gathered_once(planned) -> None:
    whole = {"device": "none", "stage3_allgather_sequential": False}  # DeepSpeed's default
    assert find_problems(planned(16, 512 * GIB, **whole))
    setup = planned(16, 512 * GIB, device="none")
    assert find_problems(setup) == []
    assert 115e9 < predict_memory(setup).peak < 125e9


def test_h100s_need_the_offload_and_experts_gathered_once(planned) -> None:
    twice = planned(8, 2 * TB, "h100", stage3_allgather_sequential=False)
    (problem,) = find_problems(twice)
    assert problem.startswith("a GPU needs")
    assert find_problems(planned(8, 2 * TB, "h100")) == []


def test_buffers_for_nvme_must_hold_the_largest_part(planned) -> None:
    nvme = {"device": "nvme", "buffer_count": 5, "buffer_size": 2e9}
    assert find_problems(planned(8, 512 * GIB, **nvme)) == []
    (problem,) = find_problems(planned(4, 512 * GIB, **nvme))
    assert "buffer_size=2e+09 is below the 3,221,225,472 elements" in problem


def test_times_by_hand(planned) -> None:
    times = predict_times(planned(8, 2 * TB))
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
    assert speed(planned(8, 2 * TB))[0] == pytest.approx(8 * 8192 / sum(times.values()))
    nvme = predict_times(planned(8, 2 * TB, device="nvme"))
    assert nvme["from NVMe"] == pytest.approx(482.2, rel=1e-3)
    assert "copies" not in times
    assert "copies" in predict_times(planned(8, 2 * TB, stage3_allgather_sequential=False))


def test_a_gpu_almost_full_is_reported(planned) -> None:
    setup = planned(8, 2 * TB)
    for share, is_told in ((0.8, False), (0.9, True), (1.1, False)):
        gpu = setup.gpu._replace(num_bytes=int(predict_memory(setup).needed / share))
        assert ("give memory back" in describe(replace(setup, gpu=gpu))) == is_told, share


def test_a_network_slower_than_nvlink_bounds_the_gathers(planned) -> None:
    times = predict_times(replace(planned(16, 2 * TB), network_rate=50e9))
    assert times["all-gather"] == pytest.approx(3 * 1125.118 * 15 / 16 / 50, rel=1e-3)


def test_one_screen_says_it_all(planned) -> None:
    text = describe(planned(8, 512 * GIB))
    assert len(text.splitlines()) <= 40
    for text_part in (
        "562.6B parameters, 205.6M trained; estimates, GB are 10^9 bytes",
        "1,125.1 offloaded weights",
        "388.6 rounded up to powers of two (not with DS_PIN_MEMORY_BACKEND=native)",
        "1,125.1 the model's folder",
        "12.6 all-gather",
        "27.1 seconds a micro-step",
        "2,416 8 h200, --max_tokens 8192, --gradient_accumulation_steps 32, offload_param cpu",
    ):
        assert text_part in text, text_part
    assert text.splitlines()[-1].startswith("DOES NOT FIT: a node needs 1,561.7 GB")
    assert describe(planned(8, 2 * TB)).endswith("It fits.")


def test_alternatives_fit_and_use_the_machine_better(planned) -> None:
    """What is asked fits; a larger micro-batch, for which the weights travel less often, shows,
    with as many tokens in a step."""
    asked = planned(8, 2 * TB)
    found = alternatives(asked)
    assert all(find_problems(other) == [] for other in found)
    assert [other.nodes for other in found] == sorted(other.nodes for other in found)
    best = found[0]
    assert (best.gpus, best.zero.device, best.run.max_tokens) == (8, "cpu", 32768)
    assert speed(best) > (2 * speed(asked)[0], 0)
    assert best.run.max_tokens * best.gradient_accumulation_steps == 8192 * 32
    assert {(other.nodes, other.zero.device) for other in found} == {
        (1, "cpu"), (1, "nvme"), (2, "none"), (2, "cpu"), (2, "nvme"),
    }  # fmt: skip
    assert alternatives(best)[0] != best
    # Where the asked one does not fit on its GPUs, a smaller one is reported.
    small = replace(asked, gpu=asked.gpu._replace(num_bytes=predict_memory(asked).needed - 1))
    assert alternatives(small)[0].run.max_tokens < 8192


def test_a_small_model_on_a_gpu_is_warned_to_use_it(tmp_path: Path) -> None:
    config = tiny_config(vision_config=VISION, audio_config=AUDIO)
    setup = Setup(
        sizes=ModelSizes.of(config), run=RunArguments(tuning="full"), gpus=1,
        zero=read_zero_settings(None, config.hidden_size), gpu=GPUS["h100"], host_bytes=TB,
    )  # fmt: skip
    (other,) = alternatives(setup)
    assert str(other).endswith("--gradient_accumulation_steps 8, --gradient_checkpointing false")


def test_a_tiny_model_on_cpus_fits_and_is_reported_without_gpus(tmp_path: Path) -> None:
    config = tiny_config(vision_config=VISION, audio_config=AUDIO)
    for deepspeed in (None, "ds_config.json", "ds_config_nvme.json"):
        zero = read_zero_settings(deepspeed, config.hidden_size)
        run = RunArguments(tuning="full")
        setup = Setup(sizes=ModelSizes.of(config), run=run, zero=zero, gpus=2, host_bytes=16 * GIB)
        assert find_problems(setup) == []
        assert predict_times(setup) == {}
        assert "2 processes on CPUs" in describe(setup)
        assert alternatives(setup) == []


def test_check_fits_raises_for_what_does_not_fit_and_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = training_arguments(tmp_path, "ds_config.json")
    config = tiny_config()
    setup = check_fits(RunArguments(), training, config)
    assert setup is not None
    assert setup.gpus == 1
    assert setup.gpu is None
    monkeypatch.setattr(plan_module, "host_memory", lambda: 1 << 14)
    with pytest.raises(ValueError, match="host memory") as error:
        check_fits(RunArguments(), training, config)
    assert "--force" in str(error.value)
    assert "No other setting fits" in str(error.value)
    check_fits(RunArguments(force=True), training, config)
    assert "host memory" in caplog.text


def test_check_fits_names_the_settings_that_fit(
    planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "Setup", lambda **_: planned(8, 512 * GIB))
    with pytest.raises(
        ValueError, match=r"this run does not fit \(8 h200.*: a node needs"
    ) as error:
        check_fits(RunArguments(), training_arguments(tmp_path, "ds_config.json"), tiny_config())
    message = str(error.value)
    assert "What would fit: 8 h200, --max_tokens 32768" in message
    assert "offload_param nvme" in message
    assert "offload_param cpu" not in message.partition("What would fit")[2]


def test_check_fits_looks_at_folders_and_the_released_model_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_arguments(tmp_path, "ds_config.json")
    assert check_fits(RunArguments(model_name_or_path="someone/else"), training) is None
    save_config(tiny_config(), tmp_path / "model")
    setup = check_fits(RunArguments(model_name_or_path=str(tmp_path / "model")), training)
    assert setup is not None
    assert setup.sizes.config.hidden_size == tiny_config().hidden_size
    monkeypatch.setattr(plan_module, "host_memory", lambda: 512 * GIB)
    with pytest.raises(ValueError, match=r"host memory and has 549\.8"):
        check_fits(RunArguments(model_name_or_path=RELEASED), training)


def test_the_run_that_is_looked_at_is_that_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes come from the launcher, all else from the two sets of options."""
    options = {"gradient_accumulation_steps": 3, "gradient_checkpointing": False, "bf16": False}
    options |= {"dataloader_num_workers": 5, "save_total_limit": 1}
    training = training_arguments(tmp_path, **options)
    monkeypatch.setattr(OmniTrainingArguments, "world_size", 16)
    monkeypatch.setenv("LOCAL_SIZE", "8")  # DeepSpeed's launcher; torchrun: LOCAL_WORLD_SIZE
    run = RunArguments(max_tokens=17)
    setup = check_fits(run, training, tiny_config())
    assert setup is not None
    assert (setup.gpus, setup.nodes, setup.run) == (16, 2, run)
    assert {name: getattr(setup, name) for name in options} == options
