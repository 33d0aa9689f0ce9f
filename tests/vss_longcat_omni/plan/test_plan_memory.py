"""The plan's memory: the released model by hand, and layers and adapters as they really are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, tiny_config
from vss_longcat_omni.model.attention import compute_rotation
from vss_longcat_omni.model.language_model import LongcatFlashModel
from vss_longcat_omni.model.lora import add_lora, count_trainable
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.lora_targets import LORA_TARGETS
from vss_longcat_omni.plan.inputs import (
    GIB,
    GPUS,
    Job,
    Machine,
    ModelSizes,
    ZeroSettings,
    load_sizes,
    read_zero_settings,
    released_config,
)
from vss_longcat_omni.plan.memory import (
    predict_memory,
    saved_values,
    total,
)

H200 = GPUS["h200"]
MACHINE = Machine(gpus=8, gpu=H200, gpu_bytes=H200.num_bytes)
LAYER_EXPERTS = 38.654705664e9  # bytes


@pytest.fixture(scope="module")
def released_sizes() -> ModelSizes:
    return load_sizes(released_config())


def zero_settings(**changes: Any) -> ZeroSettings:
    return dataclasses.replace(read_zero_settings("ds_config.json", 6144), **changes)


def test_the_released_model_by_hand(released_sizes: ModelSizes) -> None:
    sizes = released_sizes
    language_model = sizes.count("model.", "lm_head.")
    assert language_model * 2 / 1e9 == pytest.approx(1121.3, abs=0.05)
    assert language_model * 2 / 8 / 1e9 == pytest.approx(140.2, abs=0.05)
    assert sizes.experts == 512 * 4096 * 6144 + 512 * 6144 * 2048
    assert sizes.experts * 2 == LAYER_EXPERTS
    assert sizes.shapes[sizes.largest] == (512, 4096, 6144)
    assert sizes.count_lora(32) == 205_635_584
    job = Job(zero=zero_settings(offload="none"))
    memory = predict_memory(job, sizes, MACHINE)
    assert memory["weights"] == pytest.approx(sizes.count() * 2 / 8, rel=1e-6)
    assert memory["layer inputs"] == 28 * 8192 * 6144 * 2
    assert memory["trained adapters"] == 205_635_584 * 2 / 8
    assert memory["gradients, optimizer"] == 205_635_584 * 14 / 8
    assert memory["the model's folder"] == pytest.approx(1125.1e9, rel=1e-4)


@pytest.mark.parametrize("is_sequential", [False, True])
def test_experts_are_gathered_whole_and_twice_unless_sequential(
    released_sizes: ModelSizes, is_sequential: bool
) -> None:
    job = Job(zero=zero_settings(is_sequential=is_sequential))
    memory = predict_memory(job, released_sizes, MACHINE)
    gathering = memory.moments["gathering experts for their backward"]
    others = memory.moments["the experts' backward"] - LAYER_EXPERTS
    rows = 8192 * 12 * (3 * 6144 + 2 * 2048) * 2
    copies = 1 if is_sequential else 2
    assert gathering == pytest.approx(others - rows + copies * LAYER_EXPERTS + LAYER_EXPERTS / 8)
    assert memory.peak == max(memory.moments.values())


def test_one_gpu_gathers_nothing_and_without_zero_3_every_gpu_has_all(
    released_sizes: ModelSizes,
) -> None:
    one = dataclasses.replace(MACHINE, gpus=1)
    resident = predict_memory(Job(zero=zero_settings(offload="none")), released_sizes, one)
    assert resident["a layer's experts, gathered"] == 0
    assert resident["weights"] == released_sizes.count() * 2
    away = predict_memory(Job(zero=zero_settings()), released_sizes, one)
    assert away["weights"] == 0
    assert away["a layer's experts, gathered"] == LAYER_EXPERTS
    plain = predict_memory(Job(zero=ZeroSettings()), released_sizes, MACHINE)
    assert plain["weights"] == released_sizes.count() * 2


def test_pinned_memory_is_rounded_up_to_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("DS_PIN_MEMORY_BACKEND", raising=False)
    # An eighth of 3 GiB in bfloat16 takes 512 MiB instead of 384.
    name = "model.layers.0.mlp.experts.gate_up_proj"
    sizes = ModelSizes(tiny_config(), {name: (3 * 2**29,)})
    memory = predict_memory(Job(zero=zero_settings()), sizes, MACHINE)
    assert memory["offloaded weights"] == 3 * GIB
    assert memory["rounded up to powers of two"] == 1 * GIB
    unpinned = predict_memory(Job(zero=zero_settings(pin_memory=False)), sizes, MACHINE)
    assert unpinned["rounded up to powers of two"] == 0
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    assert total(predict_memory(Job(zero=zero_settings()), sizes, MACHINE).host) == pytest.approx(
        total(memory.host) - GIB
    )


def test_nvme_needs_its_buffers_in_host_memory(released_sizes: ModelSizes) -> None:
    zero = zero_settings(offload="nvme", buffer_count=5, buffer_size=2e9)
    memory = predict_memory(Job(zero=zero), released_sizes, MACHINE)
    assert memory["NVMe buffers"] == 8 * 5 * 2e9 * 2
    assert memory["offloaded weights"] == 0
    assert memory["NVMe offload"] == pytest.approx(1125.1e9, rel=1e-4)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_a_proj", "kv_b_proj", "down_proj")])
def test_adapters_are_counted_as_they_are_made(targets: tuple[str, ...]) -> None:
    config = tiny_config(vision_config=VISION, audio_config=AUDIO)
    sizes = load_sizes(config)
    model = LongcatOmniForCausalLM(config)
    assert sizes.count() == sum(p.numel() for p in model.parameters())
    adapted = add_lora(model, r=5, alpha=5, dropout=0.0, targets=targets)
    assert sizes.count_lora(5, targets) == count_trainable(adapted)
    job = Job(zero=ZeroSettings(), lora_r=5, lora_targets=targets, train_audio_heads=True)
    heads = sum(p.numel() for n, p in model.named_parameters() if "speech_heads." in n)
    tables = sum(p.numel() for n, p in model.named_parameters() if "audio_embedding." in n)
    assert sizes.count_trained(job) == count_trainable(adapted) + heads + tables


class SavingLinear(torch.autograd.Function):
    """Saves its input whether its weight is frozen or not, as DeepSpeed's linear does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.saved_tensors[1], None


def test_activations_are_what_autograd_saves_in_a_real_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = F.linear

    def save_inputs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return SavingLinear.apply(x, weight) if bias is None else linear(x, weight, bias)  # pyright: ignore

    config = tiny_config(num_layers=1, qk_nope_head_dim=8, v_head_dim=12, ffn_hidden_size=88)
    base = LongcatFlashModel(config)
    layer: Any = base.layers[0]
    for weight in layer.mlp.experts.parameters():
        nn.init.normal_(weight, std=0.1)
    model = add_lora(base, r=3, alpha=3, dropout=0.0, targets=LORA_TARGETS)
    monkeypatch.setattr(F, "linear", save_inputs)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = 257
    x = torch.randn(tokens, config.hidden_size, requires_grad=True)
    saved: dict[int, Tensor] = {}  # by memory; held, so that none is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rotation = compute_rotation(torch.arange(tokens), config.qk_rope_head_dim, 1e4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, rotation, [tokens])
    # The layer's own input is counted with the layers' inputs.
    others = {*weights, x.untyped_storage().data_ptr()}
    measured = sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in others)
    job = Job(zero=ZeroSettings(), lora_r=3, lora_dropout=0.0, is_bf16=False)
    values = saved_values(config, job)
    predicted = 2 * values["attention"] + 2 * values["mlp"] + values["experts"] + values["norm"]
    predicted -= config.hidden_size  # the router's float32 copy, here the input itself
    assert measured == pytest.approx(tokens * predicted * 4, rel=0.02)
