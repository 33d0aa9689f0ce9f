"""Counts, without weights, the model's parameters, what is trained and what a layer saves.

The plan computes with it; shapes come from the model's own classes on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vss_longcat_omni.model.omni import LongcatOmniForCausalLM

if TYPE_CHECKING:
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.options.run_arguments import RunArguments


@dataclass(frozen=True)
class ModelSizes:
    """Holds every parameter's shape by name; all numbers count elements."""

    config: LongcatOmniConfig
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: LongcatOmniConfig) -> ModelSizes:
        with torch.device("meta"):
            model = LongcatOmniForCausalLM(config)
        return cls(config, {name: tuple(p.shape) for name, p in model.named_parameters()})

    def count(self, *prefixes: str) -> int:
        """Count the parameters whose names begin so; all without prefixes."""
        return sum(math.prod(s) for n, s in self.shapes.items() if n.startswith(prefixes or ""))

    @property
    def experts(self) -> int:
        """Return the parameters of one layer's experts."""
        return self.count("model.layers.0.mlp.experts.")

    def lora_shapes(self, run: RunArguments) -> list[tuple[int, ...]]:
        """Return (outputs, inputs) of the linears that get an adapter, by PEFT's rule."""
        linears = ((n.split("."), s) for n, s in self.shapes.items() if len(s) == 2)
        return [s for path, s in linears if path[-2] in run.lora_target_modules]

    def count_trained(self, run: RunArguments) -> int:
        if run.tuning == "full":
            return self.count()
        trained = run.lora_r * sum(map(sum, self.lora_shapes(run)))
        trained += self.count("vision_projector.", "audio_projector.") * run.train_projectors
        return trained + self.count("audio_embedding.", "speech_heads.") * run.train_audio_heads


def count_saved(config: LongcatOmniConfig, run: RunArguments, itemsize: int) -> tuple[float, float]:
    """Count what autograd saves a token under ZeRO-3: in a layer, and to its experts' backward.

    Every linear saves its input (DeepSpeed's own does, frozen or not), and with adapters the
    dropped-out input, the dropout's mask (a byte each) and r values between A and B. Norms save
    their input, multiplications both factors, attention q, k, v, its output and two float32 a head.
    """
    lora = run.tuning == "lora"
    hidden, width, inner = config.hidden_size, config.ffn_hidden_size, config.expert_ffn_hidden_size
    heads, rope, v_dim = config.num_attention_heads, config.qk_rope_head_dim, config.v_head_dim
    extra = (1 + 1 / itemsize) * lora * (run.lora_dropout > 0)
    r, float32 = run.lora_r * lora, 4 / itemsize
    attention = (1 + 2 * extra) * hidden  # q_a and kv_a share one input
    attention += (2 + extra) * (config.q_lora_rank + config.kv_lora_rank) + rope
    attention += 2 * heads * (config.qk_nope_head_dim + rope) + heads * v_dim
    attention += (2 + extra) * heads * v_dim + 2 * float32 * heads + 5 * r
    mlp = (2 + 2 * extra) * hidden + (4 + extra) * width + 3 * r
    router = float32 * (hidden + (config.n_routed_experts or 0) + config.zero_expert_num)
    experts = config.moe_topk * (4 * inner + 40 / itemsize)  # and five indices of a pick
    experts += config.moe_topk * (hidden + inner) * (not lora) + router
    return 2 * attention + 2 * mlp + experts + hidden, attention + 2 * hidden + experts
