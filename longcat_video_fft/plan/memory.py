"""Predicts the peak of a GPU's memory from shapes alone; `dry_run.py` prints it.

A training step has a few moments at which memory can be highest. For each one, what is alive then
is counted from what `training/parallel.py` and `training/optimizer.py` allocate; the largest is the
peak, to be compared with `torch.cuda.max_memory_allocated`. FSDP2's part follows
torch/distributed/fsdp/_fully_shard: rows are cut evenly and padded, a block is gathered in the
compute dtype while the next is fetched, and its gradients are reduced in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longcat_video_fft.model.flops import feed_forward_width
from longcat_video_fft.options.config_rules import free_blocks, offloaded_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.config_rules import World

    Shape = tuple[int, ...]

GIB = 2**30
FP32, BF16 = 4, 2
# What a compiled block keeps for its backward, in values a token beside three of the feed-forward
# width, and what is alive at once in its backward beside that. Fitted to 14 runs on H200, of 4 to
# 48 blocks, on one and two GPUs (README.md, "Phase 2"): all are within -4 and +9 % of them.
BLOCK_WIDTHS = 13.85
GRADIENT_WIDTHS, GRADIENT_FFN_WIDTHS = 2, 1
GATHERED_BLOCKS = 3  # in use, fetched ahead, and the buffer that it is fetched into
SLABS = 1.2  # host memory that training/offload.py pins for a byte, measured 1.18: slabs have ends
OPTIMIZER_CHUNK = 1 << 26  # optimizer.CHUNK: elements of a host-memory block updated at once


@dataclass(frozen=True)
class Part:
    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True)
class Memory:
    """What a GPU holds at the moment of its peak, and the sums at the other moments."""

    moment: str
    parts: tuple[Part, ...]
    moments: dict[str, int]
    host: tuple[Part, ...]  # in host memory, a GPU

    @property
    def peak(self) -> int:
        """Bytes allocated, without allocator slack and CUDA context."""
        return sum(part.num_bytes for part in self.parts)

    def __getitem__(self, name: str) -> int:
        """Bytes of the part of that name at the peak; 0 when it is not alive then."""
        return sum(part.num_bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class ModelSizes:
    """Shapes of the parameters by unit of sharding: each block, and the root with all the rest."""

    config: dict[str, Any]  # the transformer's
    blocks: tuple[tuple[Shape, ...], ...]
    root: tuple[Shape, ...]

    @property
    def num_parameters(self) -> int:
        units = (*self.blocks, self.root)
        return sum(math.prod(shape) for unit in units for shape in unit)


def model_sizes(model: Any) -> ModelSizes:
    """Of a LongCatVideoTransformer3DModel, on the meta device or not, not yet sharded."""
    blocks = tuple(tuple(tuple(p.shape) for p in block.parameters()) for block in model.blocks)
    root = tuple(
        tuple(param.shape)
        for name, param in model.named_parameters()
        if not name.startswith("blocks.")
    )
    return ModelSizes(dict(model.config), blocks, root)


def shard_size(shapes: Sequence[Shape], shards: int) -> int:
    """Elements that one of `shards` devices holds: rows cut evenly, padded to the first's share."""
    return sum(math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in shapes)


def state_bytes(shapes: Sequence[Shape], shards: int, optimizer: str) -> int:
    """Optimizer states of one device: two a weight; float8 ones have a float32 scale a row."""
    each = {"adamw": 2 * FP32, "adamw_bf16": 2 * BF16, "adamw_8bit": 2}[optimizer]
    if optimizer != "adamw_8bit":
        return each * shard_size(shapes, shards)
    matrices = [shape for shape in shapes if len(shape) > 1]
    vectors = [shape for shape in shapes if len(shape) == 1]
    scales = 2 * FP32 * sum(math.ceil(shape[0] / shards) for shape in matrices)
    return each * shard_size(matrices, shards) + scales + 2 * BF16 * shard_size(vectors, shards)


def master_bytes(config: TrainConfig) -> int:
    """Of one weight as it is kept, and of its gradient."""
    return FP32 if config.optimizer == "adamw" else BF16


def predict_memory(config: TrainConfig, sizes: ModelSizes, world: World, bucket: Bucket) -> Memory:
    """The peak on one GPU for micro-batches of `bucket`, from the second step on."""
    run = _Run(config, sizes, world, bucket)
    moments = run.moments()
    sums = {name: sum(part.num_bytes for part in parts) for name, parts in moments.items()}
    highest = max(sums, key=lambda name: sums[name])
    parts = tuple(part for part in moments[highest] if part.num_bytes)
    return Memory(highest, parts, sums, tuple(p for p in run.host() if p.num_bytes))


class _Run:
    """Bytes that the moments share."""

    def __init__(
        self, config: TrainConfig, sizes: ModelSizes, world: World, bucket: Bucket
    ) -> None:
        self.config, self.sizes, self.shards = config, sizes, world.shard_size
        self.depth = len(sizes.blocks)
        self.resident = self.depth - min(config.musubi_blocks_to_swap, self.depth)
        self.compute = BF16 if config.mixed_precision == "bf16" else FP32
        self.master = master_bytes(config)
        self.latents = config.train_batch_size * math.prod(bucket.latent_shape)
        self.tokens = config.train_batch_size * bucket.num_tokens // world.context_size
        self.width = sizes.config["hidden_size"]
        self.ffn = feed_forward_width(self.width, sizes.config["mlp_ratio"])
        self.heads = sizes.config["num_heads"]
        self.context_size = world.context_size
        self.largest_block = max(sum(map(math.prod, block)) for block in sizes.blocks)
        self.per = f" / {self.shards} GPUs" if self.shards > 1 else ""
        self.free = free_blocks(config, self.depth)  # whose activations all stay

    def on_gpu(self, first: int = 0) -> list[Shape]:
        """Shapes of the parameters that live on the GPU, from block `first` on, with the root."""
        blocks = self.sizes.blocks[first : self.resident]
        return [*self.sizes.root, *(shape for block in blocks for shape in block)]

    def lasting(self, first_done: int | None) -> list[Part]:
        """What is there all the time, with the gradients of blocks from `first_done` on (None: of
        the whole model)."""
        count = shard_size(self.on_gpu(), self.shards)
        with_grads = count
        if first_done is not None and self.config.gradient_accumulation_steps == 1:
            done = [s for block in self.sizes.blocks[first_done : self.resident] for s in block]
            with_grads = shard_size(done, self.shards)
        states = state_bytes(self.on_gpu(), self.shards, self.config.optimizer)
        ema = FP32 * count * (self.config.ema_decay is not None)
        whole = f"{self.sizes.num_parameters / 1e9:.3f}B"
        return [
            Part("parameters", self.master * count, f"{whole} x {self.master} B{self.per}"),
            Part("gradients", self.master * with_grads,
                 f"{with_grads / 1e9:.3f}B here x {self.master} B"),
            Part("optimizer states", states, f"{whole} x {states / count:.2f} B{self.per} "
                 f"({self.config.optimizer})"),
            Part("moving average", ema, f"{whole} x 4 B{self.per}"),
        ]  # fmt: skip

    def gathered(self, *, is_backward: bool) -> list[Part]:
        block, root = self.largest_block, sum(map(math.prod, self.sizes.root))
        million = f"{block / 1e6:.1f}M"
        parts = [
            Part("gathered blocks", self.compute * (GATHERED_BLOCKS * block + root),
                 f"{GATHERED_BLOCKS} blocks x {million} x {self.compute} B, and the embedders"),
        ]  # fmt: skip
        if is_backward:
            parts += [
                Part("a block's own gradients", self.compute * block,
                     f"{million} x {self.compute} B, not yet reduced"),
                Part("reduction buffers", 2 * FP32 * block,
                     f"this and the previous block: 2 x {million} x 4 B"),
            ]  # fmt: skip
        return parts

    def kept(self, alive: int, *, moving: int = 2) -> list[Part]:
        """What the first `alive` blocks keep for their backward, but for what host memory has."""
        away = set(self.moved(alive, moving))
        here = [index for index in range(alive) if index not in away]
        checkpointed = self.num_checkpointed(here)
        others = len(here) - checkpointed
        one = self.tokens * self.width * self.compute
        where = f"{self.tokens} tokens x {self.width} x {self.compute} B"
        note = f" ({len(away)} others in host memory)" if away else ""
        mode = self.config.gradient_checkpointing_mode
        attention = (one + self.tokens * self.heads * FP32) * (mode != "full")
        ffn = one * (mode == "selective_ffn")
        return [
            Part("block inputs", checkpointed * one, f"{where} x {checkpointed} blocks{note}"),
            Part("kept attention outputs", checkpointed * attention,
                 f"({where} + {self.heads} x 4 B) x {checkpointed} blocks{note}"),
            Part("kept feed-forward outputs", checkpointed * ffn,
                 f"{where} x {checkpointed} blocks{note}"),
            Part("blocks without checkpoint", others * self.block_activations,
                 f"{self.values:.0f} values a token x {self.compute} B x {others} blocks{note}"),
        ]  # fmt: skip

    def num_checkpointed(self, blocks: list[int]) -> int:
        return sum(index not in self.free for index in blocks)

    def moved(self, alive: int, moving: int = 2) -> list[int]:
        """Of the first `alive` blocks those whose activations are in host memory alone: all that
        are offloaded but the last ones, which have not left yet or are back
        (`training/offload.py`)."""
        return [i for i in offloaded_blocks(self.config, self.depth) if i < alive][:-moving]

    @property
    def num_kept(self) -> int:
        """Tensors as large as its input that a checkpointed block keeps, its input among them."""
        modes = ("full", "selective", "selective_ffn")
        return 1 + modes.index(self.config.gradient_checkpointing_mode)

    @property
    def values(self) -> float:
        """A token's, that one block keeps for its backward."""
        return BLOCK_WIDTHS * self.width + 3 * self.ffn

    @property
    def block_activations(self) -> int:
        return int(self.tokens * self.values) * self.compute

    def in_backward(self, index: int) -> list[Part]:
        """What one block's backward holds beside that."""
        values = GRADIENT_WIDTHS * self.width + GRADIENT_FFN_WIDTHS * self.ffn
        size = self.tokens * values * self.compute
        parts = [Part("gradients of activations", size, "of the feed-forward, 2 x width")]
        if self.context_size > 1:
            exchanged = 4 * self.tokens * self.width * self.compute
            parts.append(Part("exchanged heads", exchanged, "q, k, v and the output (Ulysses)"))
        if index not in self.free:
            again = self.block_activations
            again -= (self.num_kept - 1) * self.tokens * self.width * self.compute
            text = f"{self.tokens} tokens x {self.values:.0f} values x {self.compute} B"
            text += ", less what is kept" * (self.num_kept > 1)
            parts.append(Part("one block recomputed", again, text))
        return parts

    def ends(self) -> list[Part]:
        """What is there beside the blocks."""
        return [
            Part("latents and loss", 4 * FP32 * self.latents,
                 "noisy, target, prediction and its gradient, float32"),
        ]  # fmt: skip

    def moments(self) -> dict[str, list[Part]]:
        last = self.depth - 1
        checkpointed = [index for index in range(self.depth) if index not in self.free]
        final = Part(
            "final layer", 3 * FP32 * self.tokens * self.width,
            f"3 float32 copies of {self.tokens} tokens x {self.width}",
        )  # fmt: skip
        moments = {
            "forward of the last block": [
                *self.lasting(self.depth), *self.gathered(is_backward=False),
                *self.kept(self.depth, moving=3), *self.ends(),
            ],
            "end of forward": [
                *self.lasting(self.depth), *self.gathered(is_backward=False),
                *self.kept(self.depth), *self.ends(), final,
            ],
            "optimizer step": [*self.lasting(None), self.streaming()],
        }  # fmt: skip
        turns = {
            "backward of the last block": last,
            "backward of the last checkpointed block": checkpointed[-1] if checkpointed else -1,
            "backward of the first block": 0,
        }
        for name, index in turns.items():
            if index >= 0:
                moments[name] = [
                    *self.lasting(index + 1), *self.gathered(is_backward=True),
                    *self.kept(index + 1), *self.in_backward(index), *self.ends(),
                ]  # fmt: skip
        return moments

    def streaming(self) -> Part:
        """Blocks in host memory pass through the GPU piece by piece."""
        swapped = self.sizes.blocks[self.resident :]
        largest = max((shard_size([s], self.shards) for b in swapped for s in b), default=0)
        size = 4 * FP32 * min(OPTIMIZER_CHUNK, largest)
        return Part("streamed update", size, "weights, gradients and states of one piece")

    def host(self) -> list[Part]:
        """In host memory: swapped blocks, offloaded activations, a checkpoint on its way out."""
        swapped = [shape for block in self.sizes.blocks[self.resident :] for shape in block]
        everything = [*self.sizes.root, *(shape for block in self.sizes.blocks for shape in block)]
        one = self.tokens * self.width * self.compute
        # Each that another block follows is copied, the last ones too, which come back at once.
        moved = [i for i in offloaded_blocks(self.config, self.depth) if i < self.depth - 1]
        checkpointed = self.num_checkpointed(moved)
        activations = checkpointed * self.num_kept * one
        activations += (len(moved) - checkpointed) * self.block_activations
        return [
            Part("swapped blocks",
                 self.saved(swapped) + self.master * shard_size(swapped, self.shards),
                 f"weights, gradients and states of {self.depth - self.resident} blocks"),
            Part("offloaded activations", int(SLABS * activations),
                 f"of {len(moved)} blocks, {len(moved) - checkpointed} of them without checkpoint, "
                 "and ends of slabs"),
            Part("checkpoint", self.saved(everything), "a copy while it is written"),
        ]  # fmt: skip

    def saved(self, shapes: Sequence[Shape]) -> int:
        """Of weights, states and averages of one device."""
        count = shard_size(shapes, self.shards)
        states = state_bytes(shapes, self.shards, self.config.optimizer)
        return self.master * count + states + FP32 * count * (self.config.ema_decay is not None)
