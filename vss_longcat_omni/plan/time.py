"""Predicts how long a micro-step takes: work over measured rates, and the weights' transfers.

Rates were measured on H200s on 2026-11-21 (torch 2.11), those of DeepSpeed's gathers fitted to a
run of three layers on two (MEASUREMENTS.md); for other cards all are guesses, as shares of a
datasheet's peak. How the parts add up on more GPUs, or under offload, was not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vss_longcat_omni.plan.inputs import Setup

# Shares of the peak that were reached on an H200.
DENSE_SHARE = 701 / 989  # a linear, TFLOP/s
EXPERTS_SHARE = 379 / 989  # grouped matmul, 65,536 rows over 512 experts (2026-11-27)
ATTENTION_SHARE = 360 / 989  # forward, PyTorch's flash backend; the backward is 2.5 forwards
MEMORY_SHARE = 38.65e9 / 9.0e-3 / 4.8e12  # reading a layer's experts takes 9.0 ms
HOST_SHARE = 55 / 64  # pinned memory, both directions and two GPUs at once; PCIe 5
PAGEABLE_SHARE = 0.5  # of that from memory that is not pinned; assumed
LINK_SHARE = 234 / 450  # DeepSpeed's all-gathers on two GPUs (2026-11-27; NCCL's alone: 273)
SAMPLE_TOKENS = 8192  # shorter samples need less attention; longer micro-batches are packs of them
GATHER_SECONDS = 0.7e-3  # of the process for each tensor gathered, while the GPU waits (2026-11-27)


def predict_times(setup: Setup) -> dict[str, float]:
    """Return seconds of a micro-step by resource; empty for a card of unknown rates. Expect their
    sum: prefetching, which would overlap them, stops at stage3_max_live_parameters."""
    gpu, zero, sizes = setup.gpu, setup.zero, setup.sizes
    if gpu is None or not gpu.flops:
        return {}
    times = {"compute": _compute(setup, gpu.flops, MEMORY_SHARE * gpu.memory_rate)}
    if zero.stage != 3:
        return times
    passes, weights = 2 + setup.gradient_checkpointing, sizes.count() * setup.itemsize
    tensors = sum(name.startswith("model.layers.") for name in sizes.shapes)
    tensors += 2 * len(sizes.lora_shapes(setup.run)) * (setup.run.tuning == "lora")
    times["DeepSpeed's own work"] = passes * tensors * GATHER_SECONDS
    if setup.gpus > 1:
        links = [LINK_SHARE * gpu.link_rate] + [setup.network_rate] * (setup.nodes > 1)
        times["all-gather"] = passes * weights * (1 - 1 / setup.gpus) / min(links)
        if not zero.stage3_allgather_sequential:  # read and written, out of DeepSpeed's buffer
            times["copies"] = passes * 2 * weights / (MEMORY_SHARE * gpu.memory_rate)
    if zero.device != "none":
        rate = HOST_SHARE * gpu.host_rate * (1 if zero.pin_memory else PAGEABLE_SHARE)
        times["from host memory"] = passes * weights / setup.gpus / rate
    if zero.device == "nvme":
        times["from NVMe"] = passes * weights / setup.nodes / setup.nvme_rate
    return times


def _compute(setup: Setup, flops: float, memory_rate: float) -> float:
    """Add up forward, recomputation and backward of the language model's matrices and attention,
    the latter of samples of SAMPLE_TOKENS. Encoders and all between the matmuls are left out."""
    sizes, config, tokens = setup.sizes, setup.sizes.config, setup.run.max_tokens
    layers, again = config.num_layers, setup.gradient_checkpointing
    passes = 2 + again + (setup.run.tuning == "full")
    dense = sizes.count("model.", "lm_head.") - sizes.count("model.embed_tokens.")
    dense -= layers * sizes.experts
    choices = (config.n_routed_experts or 1) + config.zero_expert_num
    work = 2 * tokens * sizes.experts * config.moe_topk / choices  # of a layer's experts
    experts = max(work / EXPERTS_SHARE / flops, sizes.experts * setup.itemsize / memory_rate)
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    # Two attentions a layer, causal: half of the square.
    attention = 2 * layers * tokens * SAMPLE_TOKENS * config.num_attention_heads * widths
    seconds = passes * (2 * dense * tokens / DENSE_SHARE / flops + layers * experts)
    return seconds + (3.5 + again) * attention / ATTENTION_SHARE / flops
