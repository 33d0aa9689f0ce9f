"""`activation_offload_blocks`: CPU-offloads what blocks keep for the backward pass.

At 93 frames of 480x832 a recomputed block keeps 0.6 to 0.9 GB, one that is not recomputed 6 GB, and
PCIe moves 4 GB in the time of a block's forward. So the blocks are spread evenly over the model
(`config_rules.offloaded_blocks`). What one kept is copied out while the next two blocks work, and
comes back while the offloaded block after it is in its backward. The copies run on a stream of
their own, in the order of the work: memory does not depend on how far the host is ahead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 24
SLAB_BYTES = 1 << 32  # torch rounds pinned memory up to a power of two
ALIGNMENT = 512
BLOCKS_TO_COPY = 2  # blocks that may work until a copy out must be done


class View(NamedTuple):
    """A view is a tensor of a piece of memory; `offset` in elements."""

    place: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class ObservedBlock:
    """Runs one block's forward in place of its `work`. The store's copies begin and end with the
    forwards of all blocks, offloaded or not."""

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
    """Reuses host memory, and has the stream of the copies and what is on its way out."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.newest: Kept | None = None
        self.leaving: list[Kept] = []
        self.free: dict[int, list[Tensor]] = {}  # by size
        self.slabs: list[Tensor] = []  # what is left of them

    def keep(self, block: Any) -> Kept:
        """Makes the record of what a block that now begins will keep."""
        before = self.newest
        if before is not None and before.is_taken:  # of the micro-batch before
            before = None
        self.newest = Kept(block, self, before)
        return self.newest

    def begin_block(self) -> None:
        """Begins to copy out the offloaded block that has just ended."""
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
        place = next((i for i, slab in enumerate(self.slabs) if len(slab) >= size), None)
        if place is None:
            place = len(self.slabs)
            new = torch.empty(max(SLAB_BYTES, size), dtype=torch.uint8, pin_memory=True)
            self.slabs.append(new)
        buffer = self.slabs[place][:num_bytes]
        self.slabs[place] = self.slabs[place][size:]
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Gives a buffer back: only later copies on the same stream use it again."""
        self.free.setdefault(len(buffer), []).append(buffer)


class Kept:
    """The record moves what one block keeps: from the GPU to host memory, then back to the GPU.

    Pieces of memory, not tensors: several of these may be views of one piece (queries, keys and
    values of one matmul), which moves once and is free only when all of it is.
    """

    def __init__(self, block: Any, store: PinnedStore, before: Kept | None) -> None:
        self.store = store
        self.before = before  # of the offloaded block before this one: its backward comes next
        self.weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self.places: dict[int, int] = {}  # of pieces, by their address while they are kept
        self.on_gpu: list[Tensor | None] = []  # pieces, as bytes
        self.on_host: list[Tensor] = []
        self.num_views: list[int] = []  # that are still to be taken, of each piece
        self.copied = torch.cuda.Event()
        self.blocks_to_copy = BLOCKS_TO_COPY
        self.is_new, self.is_taken = True, False

    def put(self, value: Tensor) -> Tensor | View:
        """Returns where the value lies; weights stay where FSDP has them, as small tensors do."""
        storage = value.untyped_storage()
        address = storage.data_ptr()
        if storage.nbytes() < MIN_BYTES or address in self.weights:
            return value
        if address not in self.places:
            self.places[address] = len(self.on_gpu)
            self.on_gpu.append(value.new_empty(0, dtype=torch.uint8).set_(storage))  # pyright: ignore
            self.num_views.append(0)
        place = self.places[address]
        self.num_views[place] += 1
        return View(place, value.dtype, value.shape, value.stride(), int(value.storage_offset()))

    def take(self, kept: Tensor | View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not self.is_taken:
            self.is_new, self.is_taken = False, True
            self.start_copy_in()
            torch.cuda.current_stream().wait_event(self.copied)
            if self.before is not None:
                self.before.start_copy_in()
                self.before = None
        piece = self.on_gpu[kept.place]
        assert piece is not None
        self.num_views[kept.place] -= 1
        if self.num_views[kept.place] == 0:
            self.on_gpu[kept.place] = None  # the backward frees it as soon as it can
        return piece.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)

    def start_copy_out(self) -> None:
        self.is_new = False
        self.store.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.store.stream):
            for piece in self.on_gpu:
                assert piece is not None
                buffer = self.store.acquire(len(piece))
                buffer.copy_(piece, non_blocking=True)
                self.on_host.append(buffer)
            self.copied.record()

    def leave_gpu(self) -> None:
        """Frees the memory for what the current stream does after the copies."""
        if not self.is_taken:
            torch.cuda.current_stream().wait_event(self.copied)
            self.on_gpu = []

    def start_copy_in(self) -> None:
        """Copies back; nothing where all is still on the GPU: the last blocks, or asked again."""
        if not self.on_gpu:
            # Memory of the current stream, which may be in use up to here.
            pieces = [torch.empty_like(buffer, device="cuda") for buffer in self.on_host]
            self.store.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.store.stream):
                for piece, buffer in zip(pieces, self.on_host, strict=True):
                    piece.copy_(buffer, non_blocking=True)
                self.copied.record()
            self.on_gpu = list(pieces)
        for buffer in self.on_host:
            self.store.release(buffer)
        self.on_host = []
