"""The transformer against the official one's recorded results, and its own promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from longcat_video_fft.model.attention import rotary_tables
from longcat_video_fft.model.attention_kernels import use_backend
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.training.parallel import checkpoint_context
from tests.longcat_video_fft.support.dit_reference import compare_dit

REFERENCE = Path(__file__).parents[2] / "reference" / "longcat_video_dit_tiny.cases.safetensors"
TINY = {
    "hidden_size": 64, "depth": 3, "num_heads": 2, "caption_channels": 32, "adaln_tembed_dim": 32,
    "text_tokens_zero_pad": True,
}  # fmt: skip


@pytest.fixture
def model() -> LongCatVideoTransformer3DModel:
    torch.manual_seed(0)
    model = LongCatVideoTransformer3DModel(**TINY)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    return model


def run(
    model: LongCatVideoTransformer3DModel, *, num_cond: int = 0, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes output and gradients for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 8, 12, generator=generator)
    text = torch.randn(2, 1, 16, 32, generator=generator)
    timestep = torch.tensor([[0.0] * num_cond + [time] * (3 - num_cond) for time in (300.0, 800.0)])
    model.zero_grad()
    output = model(latents, timestep, text, mask, num_cond_latents=num_cond)
    output.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return output.detach(), grads


def test_official_outputs_and_gradients() -> None:
    errors = dict(compare_dit(REFERENCE))
    assert {"t2v.output", "i2v.output", "no_zero_pad.output", "t2v.grad_latents"} <= set(errors)
    assert max(errors.values()) < 1e-5, errors


def test_released_config_has_the_released_size() -> None:
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(text_tokens_zero_pad=True)
    assert sum(p.numel() for p in model.parameters()) == 13_581_071_424


def test_names_are_official() -> None:
    with safe_open(str(REFERENCE).replace(".cases.", ".weights."), "pt") as file:
        names = set(file.keys())
        config = json.loads(file.metadata()["config"])
    assert set(LongCatVideoTransformer3DModel(**config).state_dict()) == names


@pytest.mark.parametrize("mode", ["selective", "selective_ffn", "full"])
@pytest.mark.parametrize("num_cond", [0, 1])
def test_recomputed_gradients_are_the_same(
    model: LongCatVideoTransformer3DModel, mode: str, num_cond: int
) -> None:
    output, grads = run(model, num_cond=num_cond)
    for block in model.blocks:
        block.checkpoint_context = checkpoint_context(mode)  # pyright: ignore
    again, grads_again = run(model, num_cond=num_cond)
    torch.testing.assert_close(again, output, rtol=0, atol=0)
    torch.testing.assert_close(grads_again, grads, rtol=0, atol=0)


def count_calls(model: LongCatVideoTransformer3DModel, mode: str | None) -> tuple[int, int]:
    """Counts how often a run computes self-attention and the feed-forward's last matmul."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = {"attention": 0, "ffn": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in func.name() and "backward" not in func.name():
                calls["attention"] += args[0].shape[2] == args[1].shape[2]
            inner = model.blocks[0].ffn.w2.in_features  # pyright: ignore
            if func is torch.ops.aten.mm.default:
                calls["ffn"] += tuple(args[0].shape) == (144, inner) and args[1].shape[1] == 64
            return func(*args, **(kwargs or {}))

    for block in model.blocks:
        block.checkpoint_context = None if mode is None else checkpoint_context(mode)  # pyright: ignore
    with Count():
        run(model)
    return calls["attention"], calls["ffn"]


def test_what_each_mode_computes_again(model: LongCatVideoTransformer3DModel) -> None:
    """There are 144 tokens; the matmuls w1 and w3 also pass gradients of the counted shape: 2 a
    block."""
    depth = len(model.blocks)
    counts = {
        mode: count_calls(model, mode) for mode in (None, "selective_ffn", "selective", "full")
    }
    attention = {mode: count[0] / depth for mode, count in counts.items()}
    ffn = {mode: (count[1] - counts[None][1]) / depth for mode, count in counts.items()}
    assert attention == {None: 1, "selective_ffn": 1, "selective": 1, "full": 2}
    assert ffn == {None: 0, "selective_ffn": 0, "selective": 1, "full": 1}


@pytest.mark.parametrize("mode", [None, "selective"])
def test_blocks_compile_to_one_graph(
    model: LongCatVideoTransformer3DModel, mode: str | None
) -> None:
    """fullgraph makes a graph break an error. All blocks share one graph."""
    from torch._dynamo.utils import counters

    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 5:] = False
    output, grads = run(model, mask=mask)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        if mode is not None:
            block.checkpoint_context = checkpoint_context(mode)  # pyright: ignore
        work: Any = block._work
        block.work = torch.compile(  # pyright: ignore
            work, fullgraph=True, dynamic=False, backend="aot_eager"
        )
    again, grads_again = run(model, mask=mask)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(grads_again, grads)


def test_zero_keys_count_only_where_the_config_says(
    model: LongCatVideoTransformer3DModel,
) -> None:
    """With text_tokens_zero_pad what stands behind a caption's end is nothing, but has weight."""
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 9:] = False
    masked, _ = run(model, mask=mask)
    whole, _ = run(model)
    model.register_to_config(text_tokens_zero_pad=False)
    left_out, _ = run(model, mask=mask)
    assert (masked - whole).abs().max() > 1e-4
    assert (masked - left_out).abs().max() > 1e-4


def test_condition_frames_do_not_see_the_noise(model: LongCatVideoTransformer3DModel) -> None:
    latents = torch.randn(1, 16, 3, 8, 12)
    text = torch.randn(1, 1, 16, 32)
    timestep = torch.tensor([[0.0, 500.0, 500.0]])
    first = model(latents, timestep, text, num_cond_latents=1)
    latents[:, :, 1:] += 1.0
    text += 1.0
    second = model(latents, timestep, text, num_cond_latents=1)
    torch.testing.assert_close(first[:, :, 0], second[:, :, 0])
    assert (first[:, :, 1:] - second[:, :, 1:]).abs().max() > 1e-3


def test_rotary_angles() -> None:
    """44 of 128 dimensions are for time, 42 each for height and width; an angle is position times
    power."""
    cos, sin = rotary_tables((2, 3, 4), 128, torch.device("cpu"))
    assert cos.shape == (2, 12, 64)
    angle = torch.atan2(sin[1, 2 * 4 + 3], cos[1, 2 * 4 + 3])  # frame 1, row 2, column 3
    powers = [10000.0 ** (-2 * i / 44) for i in range(22)]
    powers += [2 * 10000.0 ** (-2 * i / 42) for i in range(21)]
    powers += [3 * 10000.0 ** (-2 * i / 42) for i in range(21)]
    torch.testing.assert_close(angle, torch.tensor(powers), rtol=1e-5, atol=1e-5)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="hidden_size=100"):
        LongCatVideoTransformer3DModel(hidden_size=100, num_heads=3)
    with pytest.raises(ValueError, match="patch_size"):
        LongCatVideoTransformer3DModel(**TINY, patch_size=(2, 2, 2))


def test_a_named_backend_is_used(model: LongCatVideoTransformer3DModel) -> None:
    """ "math" decomposes into plain matmuls; the results agree."""
    output, _ = run(model)
    with use_backend("math"):
        plain, _ = run(model)
    torch.testing.assert_close(plain, output)
