"""Activations in host memory: the same gradients to the bit, and less memory. Needs a GPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.options.config_rules import offloaded_blocks, spread
from longcat_video_fft.training.offload import MIN_BYTES, ObservedBlock, PinnedStore

WIDTH, ROWS, BLOCKS = 2048, 8192, 6  # an activation of 64 MiB


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.work: Any = self.layers

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, dim=-1)  # kept, views of one piece of memory
        turned = (left * right).t()
        return x + self.second(turned.sigmoid().t())  # kept, dense but not contiguous

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.work(x)


def test_blocks_are_spread_evenly() -> None:
    assert spread(0, range(6)) == []
    assert spread(3, range(6)) == [1, 3, 5]
    assert spread(4, range(6)) == [1, 2, 4, 5]
    assert spread(9, range(6)) == list(range(6))
    for count in range(49):
        assert len(spread(count, range(48))) == count


def test_blocks_that_keep_all_are_offloaded_first() -> None:
    def chosen(free: int, offloaded: int) -> list[int]:
        config = TrainConfig(uncheckpointed_blocks=free, activation_offload_blocks=offloaded)
        return offloaded_blocks(config, 8)

    assert chosen(4, 2) == [3, 7]  # of 1, 3, 5, 7
    assert chosen(4, 4) == [1, 3, 5, 7]
    assert chosen(4, 6) == [1, 2, 3, 5, 6, 7]
    assert chosen(4, 8) == list(range(8))
    assert chosen(0, 2) == [3, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offloaded", [1, 3, BLOCKS])
def test_gradients_are_equal_and_memory_is_less(offloaded: int) -> None:
    expected, most = run(0)
    found, least = run(offloaded)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    each = 4 * WIDTH * ROWS * 4  # x, both halves and the sigmoid
    assert each > MIN_BYTES
    # Two stay; what a backward adds is not at its peak then.
    assert most - least >= max(0, offloaded - 3) * each


def run(offloaded: int) -> tuple[list[torch.Tensor], int]:
    """Returns gradients of three steps with two micro-batches each, and the memory that the last
    took."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    with torch.device("cuda"):
        blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        batches = [torch.randn(ROWS, WIDTH) for _ in range(2)]
    store = PinnedStore()
    chosen = spread(offloaded, range(BLOCKS))
    for index, block in enumerate(list[Any](blocks)):
        block.work = ObservedBlock(block, store, is_offloaded=index in chosen)
    optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        for batch in batches:
            blocks(batch).square().mean().backward()
        optimizer.step()
    grads = [param.grad.clone() for param in blocks.parameters() if param.grad is not None]
    return grads, torch.cuda.max_memory_allocated() - before
