"""The language model against transformers' LongcatFlash, packing, the cache, sizes as released."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from tests.vss_longcat_omni.support.tiny import SIZES, randomize, tiny_config
from vss_longcat_omni.model import attention, experts
from vss_longcat_omni.model.attention import LatentCache
from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.language_model import LongcatFlashModel

NUM_EXPERTS = SIZES["n_routed_experts"]


@pytest.fixture
def model() -> LongcatFlashModel:
    model = LongcatFlashModel(tiny_config())
    randomize(model)
    return model


def theirs(model: LongcatFlashModel) -> LongcatFlashForCausalLM:
    """transformers' model with our weights; its experts have rows for the identity experts too."""
    other = LongcatFlashForCausalLM(LongcatFlashConfig(**SIZES))
    state = other.state_dict()
    for name, value in model.state_dict().items():
        state[f"model.{name}"][: len(value)] = value
    other.load_state_dict(state)
    return other.float()


def run(model: LongcatFlashModel, embeds: Tensor, lengths: list[int]) -> Tensor:
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return model(embeds, position_ids, lengths)


def first_moe(model: LongcatFlashModel) -> Any:
    """Typed loosely: a ModuleList does not know what it holds."""
    return model.layers[0].mlp


def relative(value: Tensor, wanted: Tensor) -> float:
    return ((value - wanted).abs().max() / wanted.abs().max()).item()


def test_outputs_and_all_gradients_equal_transformers(model: LongcatFlashModel) -> None:
    other = theirs(model)
    embeds = torch.randn(1, 23, SIZES["hidden_size"], requires_grad=True)
    ours = embeds.detach()[0].clone().requires_grad_()
    wanted = other.model(inputs_embeds=embeds).last_hidden_state[0]
    found = run(model, ours, [23])
    assert relative(found, wanted) < 1e-5
    weight = torch.randn(23, SIZES["hidden_size"])
    (wanted * weight).sum().backward()
    (found * weight).sum().backward()
    assert embeds.grad is not None
    assert ours.grad is not None
    assert relative(ours.grad, embeds.grad[0]) < 1e-5
    gradients = {name: param.grad for name, param in other.model.named_parameters()}
    for name, param in model.named_parameters():
        wanted_grad = gradients[name]
        if name == "embed_tokens.weight":  # the embeddings were given
            continue
        assert param.grad is not None, name
        assert wanted_grad is not None, name
        assert relative(param.grad, wanted_grad[: len(param)]) < 1e-5, name


def test_some_picks_are_identity_experts(model: LongcatFlashModel) -> None:
    """Else the comparison above would say nothing about them."""
    chosen, _ = first_moe(model).router(torch.randn(50, SIZES["hidden_size"]))
    assert 0.1 < (chosen >= NUM_EXPERTS).float().mean() < 0.9


def test_a_packed_sequence_sees_itself_alone(model: LongcatFlashModel) -> None:
    parts = [torch.randn(length, SIZES["hidden_size"]) for length in (5, 9, 1)]
    packed = run(model, torch.cat(parts), [5, 9, 1])
    for part, found in zip(parts, packed.split([5, 9, 1]), strict=True):
        torch.testing.assert_close(found, run(model, part, [len(part)]))


def test_padded_sequences_attend_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [60, 64, 51, 1, 63]
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, width, requires_grad=True) for width in (24, 24, 16))
    grad = torch.randn(sum(lengths), 2, 16)
    calls = []
    plain = attention.attend_padded

    def count(*inputs: torch.Tensor, scale: float) -> torch.Tensor:
        calls.append(tuple(inputs[0].shape[:2]))
        return plain(*inputs, scale=scale)

    monkeypatch.setattr(attention, "attend_padded", count)
    results = []
    for limit in (1.5, 0.0):
        monkeypatch.setattr(attention, "MAX_PADDED", limit)
        out = attention.attend(q, k, v, lengths, scale=0.2)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert calls == [(5, 64), *((1, length) for length in lengths)]
    for padded, alone in zip(*results, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_the_cache_gives_what_the_whole_sequence_gives(model: LongcatFlashModel) -> None:
    embeds = torch.randn(12, SIZES["hidden_size"])
    caches = [LatentCache() for _ in range(2 * SIZES["num_layers"])]
    found = [
        model(embeds[start:stop], torch.arange(start, stop), [stop - start], caches)
        for start, stop in itertools.pairwise([0, 7, 8, 10, 12])
    ]
    torch.testing.assert_close(torch.cat(found), run(model, embeds, [12]))


def test_checkpointing_changes_nothing(model: LongcatFlashModel) -> None:
    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(0)
        run(model, torch.randn(10, SIZES["hidden_size"]), [4, 6]).pow(2).sum().backward()
        return [param.grad for param in model.layers.parameters()]

    plain = gradients()
    model.checkpoint_every = 1
    for with_it, without in zip(gradients(), plain, strict=True):
        assert with_it is not None
        assert without is not None
        assert torch.equal(with_it, without)


def test_the_loop_over_experts_equals_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)  # the second has no row, the last two none
    rows, weight = torch.randn(10, 16, requires_grad=True), torch.randn(3, 8, 16).requires_grad_()

    def run() -> list[Tensor]:
        out = experts.grouped_linear(rows, weight, ends)[:8]
        return [out, *torch.autograd.grad(out.pow(2).sum(), [rows, weight])]

    by_kernel = run()
    monkeypatch.setattr(experts, "has_kernel", lambda _: False)
    for found, wanted in zip(run(), by_kernel, strict=True):
        torch.testing.assert_close(found[:8], wanted[:8])
    assert experts.grouped_linear(rows, weight, ends).shape == (10, 8)
    wanted = torch.cat([rows[:3] @ weight[0].t(), rows[3:8] @ weight[2].t()])
    torch.testing.assert_close(by_kernel[0], wanted)


def test_autograd_lets_go_of_weights_that_zero_3_releases() -> None:
    """DeepSpeed gives a released Parameter other memory; a saved view would keep the 25.8 GB."""
    array = np.ones((1, 8, 4), np.float32)
    memory = weakref.ref(array)
    weight = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)
    del array
    rows = torch.ones(2, 4, requires_grad=True)
    out = experts.grouped_linear(rows, weight, torch.tensor([2], dtype=torch.int32))
    weight.data = torch.empty(0)
    assert memory() is None
    weight.data = torch.full((1, 8, 4), 3.0)  # gathered again for the backward
    out.sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[24.0] * 4] * 2


def test_rubbish_in_rows_of_identity_experts_does_not_spread(
    model: LongcatFlashModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grouped matmul leaves those rows as the memory was: here, not a number."""
    layer = first_moe(model)
    x = torch.randn(20, SIZES["hidden_size"], requires_grad=True)
    layer(x).sum().backward()
    wanted = x.grad
    assert wanted is not None
    x.grad = None

    def spoil(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        out = grouped_linear(rows, weight, ends)
        is_unused = torch.arange(len(rows)) >= ends[-1]
        out.register_hook(lambda grad: grad.masked_fill(is_unused[:, None], float("nan")))
        return out.masked_fill(is_unused[:, None], float("nan"))

    grouped_linear = experts.grouped_linear
    monkeypatch.setattr(experts, "grouped_linear", spoil)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_casting_the_model_leaves_the_router_s_correction_exact(model: LongcatFlashModel) -> None:
    router = first_moe(model).router
    exact = router.e_score_correction_bias.clone()
    model.bfloat16()
    assert router.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, exact)


def test_sizes_of_the_released_model() -> None:
    """560.66 billion parameters, of which 27.15 work on a token: 8 of 12 picks have weights."""
    config = LongcatOmniConfig()
    with torch.device("meta"):
        model = LongcatFlashModel(config)
    assert first_moe(model).experts.gate_up_proj.shape == (512, 4096, 6144)
    lm_head = config.vocab_size * config.hidden_size
    total = sum(param.numel() for param in model.parameters()) + lm_head
    in_experts = sum(param.numel() for n, param in model.named_parameters() if ".experts." in n)
    embedding = model.embed_tokens.weight.numel()
    active = total - embedding - in_experts + in_experts * 8 // 512
    assert round(total / 1e9, 2) == 560.66
    assert round(active / 1e9, 2) == 27.15
