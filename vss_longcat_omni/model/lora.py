"""LoRA on the language model: the five MLA projections and the dense MLPs, by PEFT.

At r = 32 on the released model this trains 205.6 million parameters. The experts keep none: an
adapter on each would be 13 billion parameters and more (research: r = 8 on all, 2.8 billion).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel, get_peft_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

logger = logging.getLogger(__name__)

ATTENTION_TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
LORA_TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS)
# What a list written for other models means here: MLA has no such projections.
TRANSLATIONS = {
    "q_proj": ("q_a_proj", "q_b_proj"),
    "k_proj": ("kv_a_proj_with_mqa", "kv_b_proj"),
    "v_proj": ("kv_a_proj_with_mqa", "kv_b_proj"),
}


def translate_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """The targets under LongCat-Flash's names, each once, in the order of `LORA_TARGETS`.

    Raises:
        ValueError: there is no such linear layer in the language model.
    """
    translated = {name: TRANSLATIONS.get(name, (name,)) for name in targets}
    for name, instead in translated.items():
        if name in TRANSLATIONS:
            logger.warning(
                "lora_target_modules: LongCat-Flash has no %s; %s are trained instead.",
                name,
                " and ".join(instead),
            )
    wanted = {found for instead in translated.values() for found in instead}
    unknown = sorted(wanted - set(LORA_TARGETS))
    if unknown or not wanted:
        raise ValueError(
            f"lora_target_modules: {', '.join(unknown) or 'empty'}. Choose from "
            f"{', '.join(LORA_TARGETS)} (or {', '.join(TRANSLATIONS)}, which are translated)."
        )
    return tuple(name for name in LORA_TARGETS if name in wanted)


def add_lora(
    model: nn.Module, *, r: int, alpha: int, dropout: float, targets: Sequence[str]
) -> PeftModel:
    """The model with adapters, which alone are trainable from here on.

    No task_type: the adapter is for inputs in four streams, and PEFT's causal wrapper passes none
    but its own arguments on. A plain PeftModel hands over all, `generate` too.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(translate_targets(targets)),
        bias="none",
    )
    # The adapter in the model's own dtype: DeepSpeed keeps float32 copies of bfloat16 weights.
    return get_peft_model(  # pyright: ignore[reportReturnType]
        model,  # pyright: ignore[reportArgumentType]
        config,
        autocast_adapter_dtype=False,
    )


def count_trainable(model: nn.Module) -> int:
    """Numbers that are trained, also where DeepSpeed has split them over the processes."""
    return sum(
        getattr(param, "ds_numel", param.numel())
        for param in model.parameters()
        if param.requires_grad
    )
