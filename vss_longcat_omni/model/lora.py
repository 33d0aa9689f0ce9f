"""Adds LoRA to the language model by PEFT: the five MLA projections and the dense MLPs.

At r = 32 on the released model this trains 205.6 million parameters. The experts get none: an
adapter on each would be 13 billion parameters and more (research: r = 8 on all, 2.8 billion).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel, get_peft_model

from vss_longcat_omni.options.lora_targets import translate_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def add_lora(
    model: nn.Module, *, r: int, alpha: int, dropout: float, targets: Sequence[str]
) -> PeftModel:
    """Return the model with adapters, which alone are trainable from here on.

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
    """Count what is trained, also where DeepSpeed has split it over the processes."""
    return sum(
        getattr(param, "ds_numel", param.numel())
        for param in model.parameters()
        if param.requires_grad
    )
