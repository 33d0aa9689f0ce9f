"""How long a micro-step and a step take: work over measured rates, and the weights on their way.

Rates were measured on H200s on 2026-11-21 (torch 2.11), on these shapes where shapes matter; they
are used as shares of a datasheet's peak, so for other cards they are guesses. The two rates of
DeepSpeed's gathers were fitted to a run of three layers on two H200s (README, "Measured"); on more
GPUs, and with weights in host memory, how the parts add up was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vss_longcat_omni.plan.inputs import Gpu, Job, Machine, ModelSizes

# Shares of the peak that were reached on an H200.
DENSE_SHARE = 701 / 989  # a linear, TFLOP/s
EXPERTS_SHARE = 379 / 989  # grouped product, 65,536 rows over 512 experts (2026-11-27)
ATTENTION_SHARE = 360 / 989  # forward, PyTorch's flash backend
MEMORY_SHARE = 38.65e9 / 9.0e-3 / 4.8e12  # reading a layer's experts takes 9.0 ms
HOST_SHARE = 55 / 64  # pinned memory, both directions and two GPUs at once; PCIe 5
LINK_SHARE = 234 / 450  # DeepSpeed's all-gathers on two GPUs (2026-11-27; NCCL's alone: 273)
GATHER_SECONDS = 0.7e-3  # of the process for each tensor gathered, while the GPU waits (2026-11-27)
PAGEABLE_SHARE = 0.5  # of that from memory that is not pinned; assumed
BACKWARD_ATTENTION = 2.5  # forwards


@dataclass(frozen=True)
class Term:
    """One resource's time in a micro-step."""

    name: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class Times:
    terms: tuple[Term, ...]
    tokens: int  # of a micro-step, all GPUs
    grad_accum_steps: int

    @property
    def slowest(self) -> float:
        """Seconds a micro-step when nothing overlaps."""
        return sum(term.seconds for term in self.terms)

    @property
    def fastest(self) -> float:
        """When everything does."""
        return max(term.seconds for term in self.terms)

    @property
    def tokens_per_sec(self) -> float:
        """Of all GPUs, when nothing overlaps."""
        return self.tokens / self.slowest

    def __getitem__(self, name: str) -> float:
        """Seconds of the term of that name; 0 where there is none."""
        return sum(term.seconds for term in self.terms if term.name == name)


def predict_times(job: Job, sizes: ModelSizes, machine: Machine) -> Times | None:
    """None for a card whose rates are not known."""
    if machine.gpu is None:
        return None
    terms = [compute_term(job, sizes, machine.gpu), *weight_terms(job, sizes, machine)]
    return Times(tuple(terms), job.max_tokens * machine.gpus, job.grad_accum_steps)


def compute_term(job: Job, sizes: ModelSizes, gpu: Gpu) -> Term:
    """Forward, recomputation and backward of the language model's matrices and attention.

    The encoders are left out, and everything between the products. A pack of several samples needs
    less attention than the one long sample that is assumed.
    """
    config, tokens = sizes.config, job.max_tokens
    num_layers, heads = config.num_layers, config.num_attention_heads
    passes = 2 + job.is_checkpointed + (job.tuning == "full")
    dense = sizes.count("model.", "lm_head.") - num_layers * sizes.experts
    dense -= sizes.count("model.embed_tokens.")
    num_experts = config.n_routed_experts or 1
    real = config.moe_topk * num_experts / (num_experts + config.zero_expert_num)
    per_layer = sizes.experts / num_experts * tokens * real * 2  # FLOPs
    reading = sizes.experts * job.itemsize / (MEMORY_SHARE * gpu.memory_rate)
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = 2 * num_layers * tokens**2 * heads * widths  # causal: half of the square
    seconds = passes * 2 * dense * tokens / (DENSE_SHARE * gpu.flops)
    seconds += passes * num_layers * max(per_layer / (EXPERTS_SHARE * gpu.flops), reading)
    forwards = 1 + job.is_checkpointed + BACKWARD_ATTENTION
    seconds += forwards * attention / (ATTENTION_SHARE * gpu.flops)
    active = dense + num_layers * sizes.experts / num_experts * real
    text = (
        f"{passes} passes x 2 x {active / 1e9:.2f}B active parameters x {tokens} tokens, and "
        f"attention; kernels' rates alone, each a share of {gpu.flops / 1e12:.0f} TFLOP/s"
    )
    return Term("compute", seconds, text)


def weight_terms(job: Job, sizes: ModelSizes, machine: Machine) -> list[Term]:
    """What ZeRO-3 moves, all weights in each pass."""
    gpu, zero = machine.gpu, job.zero
    assert gpu is not None
    if zero.stage != 3:
        return []
    passes = 2 + job.is_checkpointed
    weights = sizes.count() * job.itemsize
    what = f"{passes} passes x {weights / 1e9:.1f} GB"
    tensors = sizes.count_layer_tensors(lora=job.tuning == "lora")
    terms = [
        Term("DeepSpeed's own work", passes * tensors * GATHER_SECONDS,
             f"{passes} passes x {tensors} tensors of the layers x {GATHER_SECONDS * 1e3:g} ms"),
    ]  # fmt: skip
    if machine.gpus > 1:
        rate, link = LINK_SHARE * gpu.link_rate, "NVLink"
        if machine.nodes > 1 and machine.network_rate < rate:
            rate, link = machine.network_rate, "the network"
        received = weights * (machine.gpus - 1) / machine.gpus
        text = f"{what} x {machine.gpus - 1}/{machine.gpus} over {link} at {rate / 1e9:.0f} GB/s"
        terms.append(Term("all-gather", passes * received / rate, text))
        if not zero.is_sequential:
            rate = MEMORY_SHARE * gpu.memory_rate
            text = f"{what} read and written at {rate / 1e12:.1f} TB/s, out of DeepSpeed's buffer"
            terms.append(Term("copies", passes * 2 * weights / rate, text))
    if zero.offload != "none":
        rate = HOST_SHARE * gpu.host_rate * (1 if zero.pin_memory else PAGEABLE_SHARE)
        text = f"{what} / {machine.gpus} GPUs over PCIe at {rate / 1e9:.0f} GB/s"
        terms.append(Term("from host memory", passes * weights / machine.gpus / rate, text))
    if zero.offload == "nvme":
        rate = machine.nvme_rate
        text = f"{what} / {machine.nodes} nodes at {rate / 1e9:.0f} GB/s of all drives"
        terms.append(Term("from NVMe", passes * weights / machine.nodes / rate, text))
    return terms
