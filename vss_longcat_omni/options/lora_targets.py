"""Chooses which linear layers of the language model get adapters, by LongCat-Flash's own names."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Return the targets by LongCat-Flash's names, each once, in the order of `LORA_TARGETS`.

    Raises:
        ValueError: there is no such linear layer in the language model.
    """
    translated = {name: TRANSLATIONS.get(name, (name,)) for name in targets}
    for name, instead in translated.items():
        if name in TRANSLATIONS:
            notice_translation(name, " and ".join(instead))
    wanted = {found for instead in translated.values() for found in instead}
    unknown = sorted(wanted - set(LORA_TARGETS))
    if unknown or not wanted:
        raise ValueError(
            f"lora_target_modules: {', '.join(unknown) or 'empty'}. Choose from "
            f"{', '.join(LORA_TARGETS)} (or {', '.join(TRANSLATIONS)}, which are translated)."
        )
    return tuple(name for name in LORA_TARGETS if name in wanted)


@functools.cache  # the options are read twice
def notice_translation(name: str, instead: str) -> None:
    logger.warning(
        "lora_target_modules: LongCat-Flash has no %s; %s are trained instead.", name, instead
    )
