"""Fuses chains of small operations to one kernel forward and one backward, on a GPU.

Only plain tensors go in, never a module or its weights: so it composes with ZeRO-3, whose weights
are empty outside the layer's call, and with gradient checkpointing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on a GPU, for any number of tokens; on a CPU it runs as written.

    Its first argument is a tensor. TORCH_COMPILE_DISABLE=1 turns all of it off.
    """
    compile_once = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def choose(first: torch.Tensor, *others: Any) -> Any:
        return (compile_once() if first.is_cuda else function)(first, *others)

    return choose
