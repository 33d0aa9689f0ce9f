"""`activation_offload_blocks`: what blocks keep for the backward pass waits in pinned host memory.

At 93 frames of 480x832 a recomputed block keeps 0.6 to 0.9 GB, one that is not recomputed 6 GB, and
PCIe moves 4 GB in the time of a block's forward. So the blocks are spread evenly over the model
(`config_rules.offloaded_blocks`). What one kept is copied out while the next two blocks work, and
comes back while the offloaded block after it is in its backward. The copies run on a stream of
their own, in the order of the work: memory does not depend on how far the host is ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 24
SLAB_BYTES = 1 << 32  # torch rounds pinned memory up to a power of two
ALIGNMENT = 512
BLOCKS_TO_COPY = 2  # blocks that may work until a copy out must be done


class ObservedBlock:
    """Forward of one block; takes the place of its `work`. The store's copies begin and end with
    the forwards of all blocks, offloaded or not."""

    def __init__(self, block: Any, store: PinnedStore, *, is_offloaded: bool) -> None:
        self.block = block
        self.work = block.work
        self.store = store
        self.is_offloaded = is_offloaded

    def __call__(self, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.work(*inputs)
        self.store.begin_block()
        if self.is_offloaded:
            kept = self.store.keep(self.block)
            with saved_tensors_hooks(kept.put, kept.take):
                out = self.work(*inputs)
        else:
            out = self.work(*inputs)
        self.store.end_block()
        return out


class PinnedStore:
    """Host memory that is used again, the stream of the copies, and who is on the way out."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.newest: Kept | None = None
        self.leaving: list[Kept] = []
        self.free: dict[int, list[Tensor]] = {}  # by size
        self.slab = torch.empty(0, dtype=torch.uint8)

    def keep(self, block: Any) -> Kept:
        """For what a block that now begins will keep."""
        before = self.newest
        if before is not None and before.is_taken:  # of the micro-batch before
            before = None
        self.newest = Kept(block, self, before)
        return self.newest

    def begin_block(self) -> None:
        """The offloaded block that has just ended begins to leave."""
        if self.newest is not None and self.newest.is_new:
            self.newest.start_copy_out()
            self.leaving.append(self.newest)

    def end_block(self) -> None:
        for kept in self.leaving:
            kept.blocks_to_copy -= 1
            if kept.blocks_to_copy == 0:
                kept.leave_gpu()
        self.leaving = [kept for kept in self.leaving if kept.blocks_to_copy > 0]

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
        self.before = before  # of the offloaded block before this one: its backward comes next
        self.weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self.on_gpu: list[Tensor | None] = []
        self.on_host: list[tuple[Tensor, Tensor]] = []  # as the tensor was; the buffer of it
        self.copied = torch.cuda.Event()
        self.blocks_to_copy = BLOCKS_TO_COPY
        self.is_new, self.is_taken = True, False

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
            self.is_new, self.is_taken = False, True
            self.start_copy_in()
            torch.cuda.current_stream().wait_event(self.copied)
            if self.before is not None:
                self.before.start_copy_in()
                self.before = None
        value = self.on_gpu[kept]
        self.on_gpu[kept] = None  # the backward frees it as soon as it can
        assert value is not None
        return value

    def start_copy_out(self) -> None:
        self.is_new = False
        self.store.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.store.stream):
            for value in self.on_gpu:
                assert value is not None
                buffer = self.store.acquire(value.nbytes)
                host = buffer.view(value.dtype).as_strided(value.shape, value.stride())
                host.copy_(value, non_blocking=True)
                self.on_host.append((host, buffer))
            self.copied.record()

    def leave_gpu(self) -> None:
        """Its memory is free for what the current stream does after the copies."""
        if not self.is_taken:
            torch.cuda.current_stream().wait_event(self.copied)
            self.on_gpu = []

    def start_copy_in(self) -> None:
        """Nothing is copied where all is still on the GPU: of the last blocks, or asked again."""
        if not self.on_gpu:
            # Memory of the current stream, which may be in use up to here.
            self.on_gpu = [torch.empty_like(host, device="cuda") for host, _ in self.on_host]
            self.store.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.store.stream):
                for value, (host, _) in zip(self.on_gpu, self.on_host, strict=True):
                    assert value is not None
                    value.copy_(host, non_blocking=True)
                self.copied.record()
        for _, buffer in self.on_host:
            self.store.release(buffer)
        self.on_host = []


def is_dense(value: Tensor) -> bool:
    """Whether its elements fill one piece of memory, in any order."""
    extent = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return extent + 1 == value.numel()
