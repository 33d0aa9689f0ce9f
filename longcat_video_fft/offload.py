"""`activation_offload_blocks`: what blocks keep for the backward pass waits in pinned host memory.

At 93 frames of 480x832 a recomputed block keeps 0.6 to 0.9 GB, one that is not recomputed over
4 GB. What a block kept is copied out while the next one works, and back while the one after it is
in its backward; the copies run on a stream of their own and in the order of the work, so the GPU
holds two blocks' at a time, and memory does not depend on how far the host is ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 24
SLAB_BYTES = 1 << 32  # torch rounds pinned memory up to a power of two
ALIGNMENT = 512


class OffloadedBlock:
    """Forward of one block; takes the place of its `work`."""

    def __init__(self, block: Any, store: PinnedStore) -> None:
        self.block = block
        self.work = block.work
        self.store = store

    def __call__(self, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.work(*inputs)
        before = self.store.newest
        if before is not None and before.is_taken:
            before = None  # of the micro-batch before
        kept = self.store.newest = Kept(self.block, self.store, before)
        if before is not None:
            before.start_copy_out()
        with saved_tensors_hooks(kept.put, kept.take):
            out = self.work(*inputs)
        if before is not None:
            before.leave_gpu()
        return out


class PinnedStore:
    """Host memory that is used again, and the stream of the copies; one for all blocks."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.newest: Kept | None = None
        self.free: dict[int, list[Tensor]] = {}  # by size
        self.slab = torch.empty(0, dtype=torch.uint8)

    def acquire(self, num_bytes: int) -> Tensor:
        if self.free.get(num_bytes):
            return self.free[num_bytes].pop()
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if len(self.slab) < size:
            self.slab = torch.empty(max(SLAB_BYTES, size), dtype=torch.uint8, pin_memory=True)
        buffer, self.slab = self.slab[:num_bytes], self.slab[size:]
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Used again only by copies on the same stream, which come after those of now."""
        self.free.setdefault(len(buffer), []).append(buffer)


class Kept:
    """The tensors that one block keeps: on the GPU, in host memory, then on the GPU again."""

    def __init__(self, block: Any, store: PinnedStore, before: Kept | None) -> None:
        self.store = store
        self.before = before  # the block before this one: its backward comes next
        self.weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self.on_gpu: list[Tensor | None] = []
        self.on_host: list[tuple[Tensor, Tensor]] = []  # as the tensor was; the buffer of it
        self.is_taken = False

    def put(self, value: Tensor) -> Tensor | int:
        """Its place in the list; weights stay where FSDP has them, and so do small tensors."""
        is_weight = value.untyped_storage().data_ptr() in self.weights
        if value.nbytes < MIN_BYTES or is_weight or not is_dense(value):
            return value
        self.on_gpu.append(value)
        return len(self.on_gpu) - 1

    def take(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not self.is_taken:
            self.is_taken = True
            self.start_copy_in()
            torch.cuda.current_stream().wait_stream(self.store.stream)
            if self.before is not None:
                self.before.start_copy_in()
                self.before = None
        value = self.on_gpu[kept]
        self.on_gpu[kept] = None  # the backward frees it as soon as it can
        assert value is not None
        return value

    def start_copy_out(self) -> None:
        self.store.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.store.stream):
            for value in self.on_gpu:
                assert value is not None
                buffer = self.store.acquire(value.nbytes)
                host = buffer.view(value.dtype).as_strided(value.shape, value.stride())
                host.copy_(value, non_blocking=True)
                self.on_host.append((host, buffer))

    def leave_gpu(self) -> None:
        """Its memory is free for what the current stream does after the copies."""
        torch.cuda.current_stream().wait_stream(self.store.stream)
        self.on_gpu = []

    def start_copy_in(self) -> None:
        """Does nothing where it is on the GPU: the last block's, which is never copied out."""
        if not self.on_host:
            return
        # Memory of the current stream, which may be in use up to here.
        self.on_gpu = [torch.empty_like(host, device="cuda") for host, _ in self.on_host]
        self.store.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.store.stream):
            for value, (host, buffer) in zip(self.on_gpu, self.on_host, strict=True):
                assert value is not None
                value.copy_(host, non_blocking=True)
                self.store.release(buffer)
        self.on_host = []


def is_dense(value: Tensor) -> bool:
    """Whether its elements fill one piece of memory, in any order."""
    extent = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return extent + 1 == value.numel()
