"""A moving average of the weights in float32, sharded as they are; better to look at than the last.

    average <- d * average + (1 - d) * weights,    d = min(decay, (1 + n) / (10 + n)) at update n

so that a young average forgets the initial values.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longcat_video_fft.model.loading import official_name, reshard
from longcat_video_fft.model.sharding import local

if TYPE_CHECKING:
    from collections.abc import Iterator


class Ema:
    """Averages the weights at 4 bytes a parameter; build it from the loaded, sharded module."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = torch.zeros((), dtype=torch.int64)
        self.averages: dict[str, Tensor] = {
            name: param.detach().to(torch.float32, copy=True)
            for name, param in named_parameters(module)
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Updates the averages; call it after each optimizer step."""
        n = int(self.num_updates)
        rest = 1 - min(self.decay, (1 + n) / (10 + n))
        for name, param in named_parameters(module):
            local(self.averages[name]).lerp_(local(param).float(), rest)
        self.num_updates += 1

    @contextlib.contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Gives the module the averages for weights inside; its own are CPU-offloaded meanwhile."""
        own = {
            name: local(param).detach().to("cpu", copy=True)
            for name, param in named_parameters(module)
        }
        self._copy_into(module, self.averages)
        try:
            yield
        finally:
            self._copy_into(module, own)

    @torch.no_grad()
    def _copy_into(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, param in named_parameters(module):
            local(param).copy_(local(values[name]))

    def state_dict(self) -> dict[str, Any]:
        """Returns the tensors themselves: what is read into them in place is loaded."""
        return {"averages": self.averages, "num_updates": self.num_updates}


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields trained parameters as they are sharded, by official name."""
    reshard(module)
    for name, param in module.named_parameters():
        if param.requires_grad:
            yield official_name(name), param
