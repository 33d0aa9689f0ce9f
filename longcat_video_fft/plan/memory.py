"""Predicts the peak of a GPU's memory from shapes alone; `dry_run.py` prints it.

A training step has a few phases in which memory can be highest: the end of the forward, each
block's backward, the optimizer's step. For each one, what is alive then is counted from what
`training/parallel.py` and `training/optimizer.py` allocate; the largest sum is the peak, to be
compared with `torch.cuda.max_memory_allocated`. FSDP2's part follows
torch/distributed/fsdp/_fully_shard: rows are cut evenly and padded, a block is gathered in the
compute dtype while the next is fetched, and its gradients are reduced in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from longcat_video_fft.model.flops import feed_forward_width
from longcat_video_fft.options.config_rules import offloaded_blocks, uncheckpointed_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.config_rules import World

    Shape = tuple[int, ...]

GIB = 2**30
FP32, BF16 = 4, 2
# What a compiled block keeps for its backward, in values a token beside three of the feed-forward
# width. Fitted to 19 runs on H200 of 4 to 48 blocks, on one and two GPUs (README.md and
# MEASUREMENTS.md); all are within -4 and +6 % (tests/longcat_video_fft/plan/test_memory.py).
BLOCK_WIDTHS = 15.5
SLABS = 1.2  # host memory that training/offload.py pins for a byte, measured 1.18: slabs have ends


class Memory(NamedTuple):
    """Bytes of a GPU: of each part at the peak, and of all parts in every phase."""

    phase: str  # of the peak
    parts: dict[str, int]
    phases: dict[str, int]
    host: dict[str, int]  # in host memory, for each GPU

    @property
    def peak(self) -> int:
        """Bytes allocated, without allocator slack and CUDA context."""
        return self.phases[self.phase]


class ModelSizes(NamedTuple):
    """Shapes of the parameters by unit of sharding: a block, and the root with all the rest."""

    config: dict[str, Any]  # the transformer's
    depth: int  # blocks, all alike
    block: tuple[Shape, ...]
    root: tuple[Shape, ...]

    def num_parameters(self) -> int:
        return self.depth * shard_size(self.block, 1) + shard_size(self.root, 1)


def model_sizes(model: Any) -> ModelSizes:
    """Those of a LongCatVideoTransformer3DModel, on the meta device or not, not yet sharded."""
    root = [tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("blocks.")]
    block = [tuple(param.shape) for param in model.blocks[0].parameters()]
    return ModelSizes(dict(model.config), len(model.blocks), tuple(block), tuple(root))


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
    """Bytes of one weight as it is kept, and of its gradient."""
    return FP32 if config.optimizer == "adamw" else BF16


def predict_memory(config: TrainConfig, sizes: ModelSizes, world: World, bucket: Bucket) -> Memory:
    """The peak on one GPU for micro-batches of `bucket`, from the second step on."""
    step = _Step(config, sizes, world, bucket)
    phases = step.phases()
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    highest = max(sums, key=lambda name: sums[name])
    return Memory(highest, phases[highest], sums, step.host())


class _Step:
    """A training step of one configuration, as bytes by the names of parts."""

    def __init__(
        self, config: TrainConfig, sizes: ModelSizes, world: World, bucket: Bucket
    ) -> None:
        self.config, self.sizes, self.world, self.depth = config, sizes, world, sizes.depth
        self.on_gpu = self.depth - min(config.musubi_blocks_to_swap, self.depth)  # blocks
        self.compute = BF16 if config.mixed_precision == "bf16" else FP32
        self.free = set(uncheckpointed_indices(config, self.depth))  # whose activations all stay
        self.offloaded = offloaded_blocks(config, self.depth)
        self.latents = config.train_batch_size * math.prod(bucket.latent_shape)
        self.tokens = config.train_batch_size * bucket.num_tokens // world.context_size
        self.width = sizes.config["hidden_size"]
        self.ffn = feed_forward_width(self.width, sizes.config["mlp_ratio"])
        # One activation of the model's width, and all that a block makes for its backward. A
        # checkpointed block keeps its input, and what its mode adds.
        self.one = self.tokens * self.width * self.compute
        self.whole = int(self.tokens * (BLOCK_WIDTHS * self.width + 3 * self.ffn)) * self.compute
        modes = ("full", "selective", "selective_ffn")
        self.num_kept = 1 + modes.index(config.gradient_checkpointing_mode)
        # Of one device: elements and optimizer states of a block and of the root.
        shards, optimizer = world.shard_size, config.optimizer
        self.block, self.root = (shard_size(u, shards) for u in (sizes.block, sizes.root))
        self.states = [state_bytes(u, shards, optimizer) for u in (sizes.block, sizes.root)]

    def phases(self) -> dict[str, dict[str, int]]:
        """What is alive in each phase."""
        blocks = 2 if self.config.fsdp_reshard_after_forward else self.depth  # in use, fetched
        block, root = shard_size(self.sizes.block, 1), shard_size(self.sizes.root, 1)
        always = {
            "gathered blocks": self.compute * (blocks * block + root),
            "latents and loss": 4 * FP32 * self.latents,  # noisy, target, prediction, its gradient
        }
        final = {"final layer": 3 * FP32 * self.tokens * self.width}
        forward = self.persistent(0) | always
        found = {
            "forward of the last block": forward | self.kept(self.depth, moving=3),
            "end of the forward": forward | self.kept(self.depth) | final,
            "optimizer step": self.persistent(self.depth, is_step=True),
        }
        backward = always | {
            "gradients of activations": self.tokens * (self.width + self.ffn) * self.compute,
            "gradients being reduced": FP32 * block,  # of the block before
            # Queries, keys, values and the output (Ulysses).
            "exchanged heads": 4 * self.one * (self.world.context_size > 1),
        }
        recomputed = self.whole - (self.num_kept - 1) * self.one
        for index in reversed(range(self.depth)):
            again = {"one block recomputed": recomputed * (index not in self.free)}
            alive = self.persistent(self.depth - 1 - index) | self.kept(index + 1)
            found[f"backward of block {index + 1} of {self.depth}"] = alive | backward | again
        return found

    def persistent(self, done: int, *, is_step: bool = False) -> dict[str, int]:
        """Parameters, states, averages, and gradients: with one micro-batch a step those of the
        last `done` blocks, which are done with their backward; else and at the step all."""
        count = with_grads = self.on_gpu * self.block + self.root
        if self.config.gradient_accumulation_steps == 1 and not is_step:
            with_grads = max(0, done - (self.depth - self.on_gpu)) * self.block
        # HSDP: FSDP2 keeps what the copies exchange until the backward ends.
        exchanges = self.world.replicate_size > 1 and not is_step
        return {
            "parameters": master_bytes(self.config) * count,
            "gradients": master_bytes(self.config) * with_grads,
            "optimizer states": self.on_gpu * self.states[0] + self.states[1],
            "moving average": FP32 * count * (self.config.ema_decay is not None),
            "gradients that copies exchange": FP32 * done * self.block * exchanges,
        }

    def kept(self, alive: int, *, moving: int = 2) -> dict[str, int]:
        """What the first `alive` blocks keep for their backward, but for what host memory alone
        has: all that is offloaded but the last `moving`, which have not left yet or are back
        (`training/offload.py`)."""
        away = set([i for i in self.offloaded if i < alive][:-moving])
        free = len([i for i in range(alive) if i in self.free and i not in away])
        blocks = alive - len(away) - free
        sums = self.tokens * self.sizes.config["num_heads"] * FP32  # the attention's logarithms
        return {
            "block inputs": blocks * self.one,
            "kept attention outputs": blocks * (self.one + sums) * (self.num_kept > 1),
            "kept feed-forward outputs": blocks * self.one * (self.num_kept > 2),
            "uncheckpointed blocks": free * self.whole,
        }

    def host(self) -> dict[str, int]:
        """In host memory: swapped blocks, offloaded activations, a checkpoint on its way out."""
        master, swapped = master_bytes(self.config), self.depth - self.on_gpu
        saved = master + FP32 * (self.config.ema_decay is not None)
        block = saved * self.block + self.states[0]
        # Each that another block follows is copied, the last ones too, which come back at once.
        moved = [index for index in self.offloaded if index < self.depth - 1]
        free = sum(index in self.free for index in moved)
        activations = (len(moved) - free) * self.num_kept * self.one + free * self.whole
        return {
            "swapped blocks": swapped * (block + master * self.block),
            "offloaded activations": int(SLABS * activations),
            "a checkpoint's copy": self.depth * block + saved * self.root + self.states[1],
        }
