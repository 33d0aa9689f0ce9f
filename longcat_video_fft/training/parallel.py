"""Sharding: activation checkpointing, then compile, then FSDP2, in that order.

The processes are laid out as (replicas, shards): parameters are cut over the shards of one replica
(FSDP2) and copied over the replicas (HSDP). Under context parallelism `context_parallel_size`
neighbors work on one micro-batch, each with its part of the tokens; they are shards like others.
Losses come in as sums divided by the *global* count: gradients are summed, never averaged.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from longcat_video_fft.model.attention_kernels import choose_kernel, resolve, use_backend
from longcat_video_fft.model.sharding import local
from longcat_video_fft.options.config_rules import offloaded_blocks, uncheckpointed_indices
from longcat_video_fft.training.ema import Ema
from longcat_video_fft.training.offload import ObservedBlock, PinnedStore
from longcat_video_fft.training.optimizer import build_optimizer

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from longcat_video_fft.options.config import TrainConfig

logger = logging.getLogger(__name__)

MAX_GRAPHS = 1024
ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.longcat_video_fft.flash4.default,  # of attention_kernels
)
MATMUL_OPS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)


def master_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype in which parameters are kept."""
    return torch.float32 if config.optimizer == "adamw" else torch.bfloat16


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trained parameters; norms and biases (all that is 1-D) have no weight decay."""
    params = [param for param in model.parameters() if param.requires_grad]
    decayed = {"params": [param for param in params if param.ndim > 1]}
    plain = {"params": [param for param in params if param.ndim <= 1]}
    groups = [
        {**decayed, "lr": config.learning_rate, "weight_decay": config.adam_weight_decay},
        {**plain, "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_mesh(config: TrainConfig, device: torch.device) -> DeviceMesh:
    """Builds the mesh (replicas, shards)."""
    replicas = config.fsdp_replicate_size
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(model: Any, config: TrainConfig, mesh: DeviceMesh) -> None:
    """Does everything that is done to a model on the meta device before it gets memory."""
    for param in model.parameters():
        param.data = param.data.to(master_dtype(config))  # on meta: free
    blocks = list(model.blocks)
    if config.context_parallel_size > 1:
        model.set_context_parallel(context_group(config, mesh.device_type))
    if config.gradient_checkpointing:
        uncheckpointed = uncheckpointed_indices(config, len(blocks))
        for index, block in enumerate(blocks):
            if index not in uncheckpointed:
                block.checkpoint_context = checkpoint_context(config.gradient_checkpointing_mode)
    if config.fp8_linears:
        from longcat_video_fft.model.fp8 import use_fp8_linears

        use_fp8_linears(model)
    if config.compile and mesh.device_type == "cuda":
        # A graph for each bucket, batch size and number of condition frames, shared by all blocks.
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
        for block in blocks:
            block.compile_block()
    if config.activation_offload_blocks:
        if mesh.device_type != "cuda":
            raise ValueError("activation_offload_blocks needs a GPU; set it to 0.")
        store, offloaded = PinnedStore(), offloaded_blocks(config, len(blocks))
        for index, block in enumerate(blocks):
            block.work = ObservedBlock(block, store, is_offloaded=index in offloaded)
    # FSDP2, a unit a block. Timesteps stay float32, so inputs are not cast.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    shard = partial(
        fully_shard,
        mesh=mesh if config.fsdp_replicate_size > 1 else mesh["shard"],
        mp_policy=policy,
        reshard_after_forward=config.fsdp_reshard_after_forward,
    )
    for block in blocks:
        if block in swapped_blocks(model, config):
            pins = mesh.device_type == "cuda"
            shard(block, offload_policy=CPUOffloadPolicy(pin_memory=pins))
        else:
            shard(block)
    shard(model)


def checkpoint_context(mode: str) -> Callable[[], Any]:
    """Chooses what a recomputed block keeps: "full" nothing, "selective" the output of
    self-attention, "selective_ffn" also that of the feed-forward's last matmul."""
    if mode == "full":
        return noop_context_fn
    policy = partial(keep_costly, keeps_ffn=mode == "selective_ffn")
    return partial(create_selective_checkpoint_contexts, policy)


def keep_costly(
    _: Any, op: Any, *args: Any, keeps_ffn: bool = False, **__: Any
) -> CheckpointPolicy:
    """Keeps what costs most to compute for its size. Self-attention is half of a block's forward;
    over the caption's few keys it is cheap. A matmul costs its inner width an output, and only
    the feed-forward's last one has an inner width above twice its outputs."""
    is_kept = False
    if op in ATTENTION_OPS:
        is_kept = args[1].shape[-2] >= args[0].shape[-2]
    elif keeps_ffn and op in MATMUL_OPS:
        is_kept = args[0].shape[-1] > 2 * args[1].shape[-1]
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def swapped_blocks(model: Any, config: TrainConfig) -> list[nn.Module]:
    """Returns the last `musubi_blocks_to_swap` blocks: parameters and states are CPU-offloaded."""
    return list(model.blocks)[len(model.blocks) - config.musubi_blocks_to_swap :]


def context_group(config: TrainConfig, device_type: str) -> dist.ProcessGroup:
    """Returns the neighbors that share a micro-batch with this process."""
    size = config.context_parallel_size
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "context")).get_group(
        "context"
    )


class Engine:
    """The engine is what the training loop drives: forward, backward, clip, step.

    Args:
        model: on the meta device.
        load_weights: called with the sharded, allocated model.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        device: torch.device,
        *,
        load_weights: Callable[[nn.Module], Any],
    ) -> None:
        self.module = model
        self.config = config
        self.device = device
        self.attention_mechanism = resolve(config.attention_mechanism, model.head_dim, device)
        model.set_attention_kernel(choose_kernel(self.attention_mechanism))
        self.mesh = build_mesh(config, device)
        self.dp_size = dist.get_world_size() // config.context_parallel_size
        self.dp_rank = dist.get_rank() // config.context_parallel_size
        parallelize(model, config, self.mesh)
        model.to_empty(device=device)
        for block in swapped_blocks(model, config):
            block.to_empty(device="cpu")
        load_weights(model)
        self.optimizer = build_optimizer(parameter_groups(model, config), config)
        self.ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
        self.grad_norm = float("nan")

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Sets the backend that `attention_mechanism` names, around forward and backward."""
        return use_backend(self.attention_mechanism)

    def backward(self, loss: Tensor) -> None:
        """`loss` is this process's share of the global mean; FSDP averages, so it is scaled
        back."""
        (loss * dist.get_world_size()).backward()

    def clip(self) -> float:
        """Clips gradients to max_grad_norm; returns the global norm before that.

        Not finite on every process when it is not finite anywhere.
        """
        grads = [local(p.grad) for p in self.module.parameters() if p.grad is not None]
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            by_device.setdefault(grad.device, []).append(grad)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for group in by_device.values():
            norms = torch._foreach_norm(group, 2, dtype=torch.float32)  # pyright: ignore
            total += torch.stack(norms).square().sum().to(self.device)
        dist.all_reduce(total, group=self.mesh.get_group("shard"))
        norm = total.sqrt().item()
        if norm > self.config.max_grad_norm > 0:
            for group in by_device.values():
                torch._foreach_mul_(group, self.config.max_grad_norm / norm)  # pyright: ignore
        self.grad_norm = norm
        return norm

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.module)
