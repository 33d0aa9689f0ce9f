"""Predicts the peak of a GPU's memory, a node's host memory and the disk; the plan prints them.

A micro-step has a few moments at which a GPU's memory can be highest. For each one, what is alive
then is counted; the largest is the peak, to be compared with the log's peak_mem_gib. What ZeRO-3
allocates is read from DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py and
partitioned_param_coordinator.py); activations are what autograd saves in this project's own layers.
With tiny layers on two CPU processes the peaks were as predicted within 10 % (50 against 52 MB, 105
against 102, 2026-11-26); on two H200, 3 layers of the released width took 1.6 % more, 4 1.4 %
(README).

Encoders are not counted: frozen, they keep their outputs alone, and run before the layers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.plan.inputs import Job, Machine, ModelSizes, Shape

FP32 = 4
MASTER_AND_STATES = 3 * FP32  # float32 copy of a trained weight and Adam's two
# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks.
CONTEXT_BYTES, SLACK = int(0.8 * 2**30), 0.03
# Not measured: Python, torch and CUDA in host memory, for each process and each loader's worker.
PROCESS_BYTES, WORKER_BYTES = 4e9, 1e9


@dataclass(frozen=True)
class Part:
    name: str
    num_bytes: float
    formula: str


@dataclass(frozen=True)
class Memory:
    """What a GPU holds at the moment of its peak, the sums at other moments; a node's; the disk."""

    moment: str
    parts: tuple[Part, ...]
    moments: dict[str, float]
    host: tuple[Part, ...]
    disk: tuple[Part, ...]

    @property
    def peak(self) -> float:
        """Bytes allocated, without allocator slack and CUDA context."""
        return total(self.parts)

    @property
    def needed(self) -> float:
        """Bytes of a GPU that the peak asks for."""
        return self.peak * (1 + SLACK) + CONTEXT_BYTES

    def __getitem__(self, name: str) -> float:
        """Bytes of the part of that name; 0 where it is not alive at the peak."""
        return sum(p.num_bytes for p in (*self.parts, *self.host, *self.disk) if p.name == name)


def total(parts: tuple[Part, ...] | list[Part]) -> float:
    return sum(part.num_bytes for part in parts)


def predict_memory(job: Job, sizes: ModelSizes, machine: Machine) -> Memory:
    run = _Run(job, sizes, machine)
    moments = run.moments()
    sums = {name: total(parts) for name, parts in moments.items()}
    highest = max(sums, key=lambda name: sums[name])
    parts = tuple(part for part in moments[highest] if part.num_bytes)
    host = tuple(part for part in run.host() if part.num_bytes)
    return Memory(highest, parts, sums, host, tuple(run.disk()))


def rounds_pinned() -> bool:
    """Whether pinned memory is allotted in powers of two: torch's way, if nothing else is asked."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "")
    settings += os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    is_native = os.environ.get("DS_PIN_MEMORY_BACKEND", "").lower() == "native"
    return not is_native and "pinned_max_round_threshold_mb" not in settings


def saved_values(config: LongcatOmniConfig, job: Job) -> dict[str, float]:
    """Values a token that autograd saves in one layer under ZeRO-3, by part.

    Of every linear its input (DeepSpeed's own linear saves it, frozen or not), and with adapters
    the dropped-out input, the dropout's mask (a byte each) and r values between A and B. Norms save
    their input, products both factors, attention q, k, v, its output and two float32 a head.
    """
    hidden, width, inner = config.hidden_size, config.ffn_hidden_size, config.expert_ffn_hidden_size
    heads, q_rank, kv_rank = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    lora = job.tuning == "lora"
    extra = (1 + 1 / job.itemsize) * lora * (job.lora_dropout > 0)
    r, float32 = job.lora_r * lora, FP32 / job.itemsize
    attention = (1 + 2 * extra) * hidden  # q_a and kv_a share one input
    attention += (2 + extra) * q_rank + (2 + extra) * kv_rank + rope
    attention += 2 * heads * (nope + rope) + heads * v_dim
    attention += (2 + extra) * heads * v_dim + 2 * float32 * heads + 5 * r
    mlp = (2 + 2 * extra) * hidden + (4 + extra) * width + 3 * r
    picks = config.moe_topk
    choices = (config.n_routed_experts or 0) + config.zero_expert_num
    experts = picks * (4 * inner + 40 / job.itemsize)  # and five indices of a pick
    experts += picks * (hidden + inner) * (job.tuning == "full")
    router = float32 * (hidden + choices)
    return {"attention": attention, "mlp": mlp, "experts": experts + router, "norm": hidden}


class _Run:
    """Bytes that the moments share."""

    def __init__(self, job: Job, sizes: ModelSizes, machine: Machine) -> None:
        self.job, self.sizes, self.machine, self.zero = job, sizes, machine, job.zero
        self.config = sizes.config
        self.size = job.itemsize
        self.is_divided = self.zero.stage == 3
        self.shards = machine.gpus if self.is_divided else 1
        self.state_shards = machine.gpus if self.zero.stage else 1
        self.trained = sizes.count_trained(job)
        self.layers = self.config.num_layers
        self.saved = saved_values(self.config, job)
        self.experts = sizes.experts * self.size
        self.largest = math.prod(sizes.shapes[sizes.largest])
        # Of one layer's experts: copies while they are gathered, and afterwards.
        self.copies = 0
        if self.shards > 1:
            self.copies = 1 if self.zero.is_sequential else 2
        # Out of a process's own memory: on CPUs, host memory is just that.
        on_cpu = machine.gpu_bytes is None
        self.is_away = self.zero.offload == "nvme" or (self.zero.offload == "cpu" and not on_cpu)
        if self.shards == 1 and self.is_away:
            self.copies = 1

    def partition(self, shape: Shape) -> int:
        """Elements of a parameter that one process keeps."""
        return math.ceil(math.prod(shape) / self.shards)

    def is_small(self, shape: Shape) -> bool:
        """Kept whole on every GPU."""
        return self.is_divided and math.prod(shape) <= self.zero.persistence_threshold

    def lasting(self) -> list[Part]:
        shapes = self.sizes.shapes.values()
        small = self.size * sum(math.prod(s) for s in shapes if self.is_small(s))
        resident = self.size * sum(map(self.partition, shapes)) * (not self.is_away)
        states = MASTER_AND_STATES if self.zero.stage else 2 * self.size
        share = self.trained / self.state_shards
        on_gpu = not self.zero.offload_optimizer or self.machine.gpu_bytes is None
        adapters = share * self.size * (self.job.tuning == "lora")
        per = f" / {self.shards} GPUs" if self.shards > 1 else ""
        parameters = f"{self.sizes.count() / 1e9:.3f}B parameters x {self.size} B{per}"
        trained = f"{self.trained / 1e6:.1f}M trained"
        bucket = self.size * self.zero.reduce_bucket * bool(self.zero.stage)
        return [
            Part("weights", resident, parameters),
            Part("small weights, whole", small,
                 f"those of at most {self.zero.persistence_threshold:,.0f} elements"),
            Part("trained adapters", adapters, f"{trained} x {self.size} B / {self.state_shards}"),
            Part("gradients, optimizer", share * (self.size + states * on_gpu),
                 f"{trained} x ({self.size} + {states * on_gpu}) B / {self.state_shards}"),
            Part("reduction buffer", bucket, f"{self.zero.reduce_bucket:,.0f} x {self.size} B"),
        ]  # fmt: skip

    def kept(self) -> list[Part]:
        """What all layers keep for the backward."""
        tokens, hidden = self.job.max_tokens, self.config.hidden_size
        if self.job.is_checkpointed:
            size = self.layers * tokens * hidden * self.size
            text = f"{self.layers} layers x {tokens} tokens x {hidden} x {self.size} B"
            return [Part("layer inputs", size, text)]
        values = self.layer_values
        activations = self.layers * tokens * values * self.size
        return [
            Part("activations", activations, f"{self.layers} layers x {tokens} tokens x "
                 f"{values:,.0f} values x {self.size} B; no checkpointing"),
        ]  # fmt: skip

    @property
    def layer_values(self) -> float:
        saved = self.saved
        return 2 * saved["attention"] + 2 * saved["mlp"] + saved["experts"] + saved["norm"]

    def recomputed(self, *, up_to_experts: bool) -> Part:
        """Of one checkpointed layer: all of it, or what its experts' backward still needs."""
        saved, tokens = self.saved, self.job.max_tokens
        values = self.layer_values
        if up_to_experts:
            values = saved["attention"] + 2 * saved["norm"] + saved["experts"]
        size = tokens * values * self.size * self.job.is_checkpointed
        text = f"{tokens} tokens x {values:,.0f} values x {self.size} B"
        return Part("recomputed layer", size, text)

    def gathered(self, copies: int, *, why: str) -> Part:
        text = f"{self.sizes.experts / 1e9:.2f}B elements x {self.size} B x {copies}: {why}"
        return Part("a layer's experts, gathered", copies * self.experts, text)

    def moments(self) -> dict[str, list[Part]]:
        lasting, kept = self.lasting(), self.kept()
        tokens, hidden, picks = self.job.max_tokens, self.config.hidden_size, self.config.moe_topk
        values = picks * (3 * hidden + 2 * self.config.expert_ffn_hidden_size)
        rows = Part(
            "rows of the experts", tokens * values * self.size,
            f"{tokens} tokens x {picks} picks x (3 x {hidden}, gradients) x {self.size} B",
        )  # fmt: skip
        stream = Part(
            "gradient of the stream", 2 * tokens * hidden * self.size,
            f"2 x {tokens} tokens x {hidden} x {self.size} B",
        )  # fmt: skip
        trains_experts = self.job.tuning == "full" and self.is_divided
        gradients = Part("their gradients", self.experts * trains_experts, "not yet divided")
        why = "one, as stage3_allgather_sequential is set"
        if self.copies == 2:
            why = "the buffer of both tensors, and each copied out of it"
        staged = self.experts / self.shards * (self.is_away and self.shards > 1)
        moments = {
            "the loss": [*lasting, *kept, *self.logits()],
            "a layer recomputed": [
                *lasting, *kept, self.recomputed(up_to_experts=False), stream,
                self.gathered(min(self.copies, 1), why="in use"),
            ],
            "gathering experts for their backward": [
                *lasting, *kept, self.recomputed(up_to_experts=True), stream,
                self.gathered(self.copies, why=why),
                Part("this GPU's part of them", staged, "on its way from host memory"),
            ],
            "the experts' backward": [
                *lasting, *kept, self.recomputed(up_to_experts=True), stream, rows,
                self.gathered(min(self.copies, 1), why="in use"), gradients,
            ],
        }  # fmt: skip
        if self.is_divided:
            weights = lasting[:2]
            whole = Part("a layer's experts, whole", self.experts, "before they are divided")
            moments["building the model"] = [*weights, whole]
        return moments

    def logits(self) -> list[Part]:
        """As if every position had a target of every stream: float32 copies and their gradients."""
        tokens, config = self.job.max_tokens, self.config
        text, audio = config.vocab_size, config.audio_head_num * config.audio_vocab_size
        head = config.vocab_size * config.hidden_size * self.size * (self.shards > 1)
        return [
            Part("logits", 3 * FP32 * tokens * (text + audio),
                 f"3 x 4 B x {tokens} tokens x ({text} + {audio}); all positions as targets"),
            Part("the head, gathered", head, "lm_head"),
        ]  # fmt: skip

    def host(self) -> list[Part]:
        """A node's, of all its processes. On CPUs what is sure alone: packs are seldom full."""
        local, zero = self.machine.per_node, self.zero
        if self.machine.gpu_bytes is None:
            size, text = local * total(self.lasting()), "without activations and Python"
            return [Part("weights and optimizer", size, f"{local} processes on CPUs, {text}")]
        numbers = [self.partition(s) for s in self.sizes.shapes.values() if not self.is_small(s)]
        exact = self.size * sum(numbers) * local * (zero.offload == "cpu")
        rounded = self.size * sum(2 ** math.ceil(math.log2(n)) for n in numbers) * local
        is_rounded = zero.pin_memory and rounds_pinned() and exact > 0
        buffers = zero.buffer_count * zero.buffer_size * self.size * (zero.offload == "nvme")
        states = MASTER_AND_STATES * self.trained / self.state_shards * zero.offload_optimizer
        workers = self.job.num_workers
        return [
            Part("offloaded weights", exact, f"{self.sizes.count() / 1e9:.3f}B parameters x "
                 f"{self.size} B, divided by {self.machine.nodes}: the nodes"),
            Part("rounded up to powers of two", (rounded - exact) * is_rounded,
                 "each tensor's part, by torch's pinned memory; none with "
                 "DS_PIN_MEMORY_BACKEND=native or pin_memory false"),
            Part("NVMe buffers", local * buffers, f"{local} processes x {zero.buffer_count} x "
                 f"{zero.buffer_size:.3g} x {self.size} B, pinned"),
            Part("offloaded optimizer", local * states, f"{self.trained / 1e6:.1f}M x 12 B"),
            Part("processes", local * (PROCESS_BYTES + workers * WORKER_BYTES),
                 f"{local} x ({PROCESS_BYTES / 1e9:.0f} GB + {workers} workers x "
                 f"{WORKER_BYTES / 1e9:.0f} GB), a rule of thumb"),
        ]  # fmt: skip

    def disk(self) -> list[Part]:
        count, trained = self.sizes.count(), f"{self.trained / 1e6:.1f}M"
        kept = self.job.num_checkpoints
        parts = [
            Part("the model's folder", 2 * count, f"{count / 1e9:.3f}B x 2 B, as released"),
            Part("checkpoints", (kept + 1) * (2 * self.size + MASTER_AND_STATES) * self.trained,
                 f"({kept} kept + 1 being written) x {trained} x ({2 * self.size} + 12) B"),
        ]  # fmt: skip
        if self.zero.offload == "nvme":
            size = self.size * sum(map(self.partition, self.sizes.shapes.values()))
            size *= self.machine.per_node
            parts.append(Part("NVMe offload", size, "weights of a node's GPUs, on its own drives"))
        return parts
