"""Predicts the peak of a GPU's memory, a node's host memory and the disk, in bytes.

What is alive is added up for each phase of a micro-step that may hold most; the largest sum is the
peak (the log's peak_mem_gib). What ZeRO-3 allocates is read from DeepSpeed 0.19.8 (runtime/zero,
partition_parameters.py and partitioned_param_coordinator.py); activations are what autograd saves
in this project's own layers. Encoders are not counted: frozen, they keep their outputs alone, and
run before the layers. MEASUREMENTS.md has the measured peaks.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple

from vss_longcat_omni.model.sizes import count_saved

if TYPE_CHECKING:
    from vss_longcat_omni.plan.inputs import Setup

FP32 = 4
MASTER_AND_STATES = 3 * FP32  # float32 copy of a trained weight and Adam's two
# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks;
# Python, torch and CUDA in host memory, for each process and each loader's worker.
CONTEXT_BYTES, SLACK = int(0.8 * 2**30), 0.03
PROCESS_BYTES, WORKER_BYTES = 4e9, 1e9
EXPERTS = "a layer's experts, gathered"


class Memory(NamedTuple):
    """Holds bytes by what they are for."""

    phases: dict[str, dict[str, float]]  # of a GPU
    host: dict[str, float]  # of a node
    disk: dict[str, float]

    @property
    def phase(self) -> str:
        """Return the phase of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.phase].values())

    @property
    def needed(self) -> float:
        """Return a GPU's peak with the allocator's slack and CUDA's context."""
        return self.peak * (1 + SLACK) + CONTEXT_BYTES


def predict_memory(setup: Setup) -> Memory:
    zero, size, local = setup.zero, setup.itemsize, setup.gpus // setup.nodes
    on_cpus, to_nvme = setup.gpu is None, zero.device == "nvme"
    is_away = to_nvme or (zero.device == "cpu" and not on_cpus)
    shards = setup.gpus if zero.stage == 3 else 1
    parts = [math.ceil(math.prod(shape) / shards) for shape in setup.sizes.shapes.values()]
    weights = size * sum(parts)  # of one process
    trained = setup.sizes.count_trained(setup.run)
    share = trained / (setup.gpus if zero.stage else 1)
    states = share * (MASTER_AND_STATES if zero.stage else 2 * size)
    has_states = on_cpus or zero.optimizer_device == "none"
    persistent = {
        "weights": weights * (not is_away),
        "trained adapters": size * share * (setup.run.tuning == "lora"),
        "gradients and optimizer": size * share + states * has_states,
        "reduction buffer": size * zero.reduce_bucket_size * (zero.stage > 0),
    }
    pinned = size * sum(2 ** math.ceil(math.log2(part)) for part in parts)
    host: dict[str, float] = {
        "offloaded weights": local * weights * (zero.device == "cpu"),
        "rounded up to powers of two (not with DS_PIN_MEMORY_BACKEND=native)":
            local * (pinned - weights) * rounds_pinned(setup),
        "NVMe buffers": local * zero.buffer_count * zero.buffer_size * size * to_nvme,
        "offloaded optimizer": local * states * (not has_states),
        "processes": local * (PROCESS_BYTES + setup.dataloader_num_workers * WORKER_BYTES),
    }  # fmt: skip
    if on_cpus:  # what is sure alone: packs are seldom full
        host = {"weights and optimizer, without activations": local * sum(persistent.values())}
    kept = setup.save_total_limit or 1
    disk: dict[str, float] = {
        "the model's folder": 2 * setup.sizes.count(),  # as released
        f"{kept} checkpoints and one being written":
            (kept + 1) * (2 * size + MASTER_AND_STATES) * trained,
        "NVMe offload of a node": local * weights * to_nvme,
    }  # fmt: skip
    return Memory(_phases(setup, persistent, shards, is_away=is_away), host, disk)


def rounds_pinned(setup: Setup) -> bool:
    """Say whether offloaded weights are pinned in powers of two, torch's way unless configured."""
    allocator = [os.environ.get(f"PYTORCH_{name}_CONF", "") for name in ("ALLOC", "CUDA_ALLOC")]
    is_native = os.environ.get("DS_PIN_MEMORY_BACKEND", "").lower() == "native"
    is_pinned = setup.zero.device == "cpu" and setup.zero.pin_memory
    return is_pinned and not is_native and "pinned_max_round_threshold_mb" not in "".join(allocator)


def _phases(
    setup: Setup, persistent: dict[str, float], shards: int, *, is_away: bool
) -> dict[str, dict[str, float]]:
    config, size, tokens = setup.sizes.config, setup.itemsize, setup.run.max_tokens
    experts, hidden = setup.sizes.experts * size, config.hidden_size
    # DeepSpeed gathers a layer's experts into a buffer and copies them out of it; with
    # stage3_allgather_sequential in place.
    copies = (1 if setup.zero.stage3_allgather_sequential else 2) if shards > 1 else int(is_away)
    staged = experts / shards * (is_away and shards > 1)
    whole = experts * (setup.zero.stage == 3)
    layer, half = count_saved(config, setup.run, size)
    kept = persistent | {"layer inputs": config.num_layers * tokens * hidden * size}
    if not setup.gradient_checkpointing:
        kept = persistent | {"activations": config.num_layers * tokens * layer * size}
        layer = half = 0
    # As if every position had a target of every stream: float32 copies and their gradients.
    logits = 3 * FP32 * (config.vocab_size + config.audio_head_num * config.audio_vocab_size)
    rows = config.moe_topk * (3 * hidden + 2 * config.expert_ffn_hidden_size)
    backward = kept | {
        "gradient of the stream": 2 * tokens * hidden * size,
        EXPERTS: min(copies, 1) * experts,
    }
    in_experts = backward | {"recomputed layer": tokens * half * size}
    return {
        "building the model": {"weights": persistent["weights"], "a layer's experts": whole},
        "computing the loss": kept | {
            "logits": tokens * logits,
            "the head, gathered": config.vocab_size * hidden * size * (shards > 1),
        },
        "recomputing a layer": backward | {"recomputed layer": tokens * layer * size},
        "gathering experts for their backward": in_experts | {
            EXPERTS: copies * experts, "this GPU's part of them, from the host": staged,
        },
        "in the experts' backward": in_experts | {
            "rows of the experts": tokens * rows * size,
            "their gradients, not yet divided": whole * (setup.run.tuning == "full"),
        },
    }  # fmt: skip
