"""Counts the bytes of all live tensors while a step runs, as the CUDA allocator would."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable


class MemoryTracker(TorchDispatchMode):
    """Counts `peak` bytes while it is entered; `standing` tensors count from the start. An
    operator's own scratch is not seen. FSDP2 resizes storages in place, so resize_ is patched."""

    def __init__(self, standing: Iterable[Any]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in standing:
            self._see(getattr(tensor, "_local_tensor", tensor).untyped_storage())

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self.now += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        return out

    def __enter__(self) -> Any:
        self.resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = self.resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # pyright: ignore
        super().__exit__(*error)
