"""Builds the model of a run from its options, under ZeRO-3 or not, and makes it trainable.

train_ds.py calls it once the data is prepared; training/trainer.py trains what comes out.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from vss_longcat_omni.model.lora import add_lora, count_trainable
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from vss_longcat_omni.dataset.special_tokens import SpecialTokens
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

logger = logging.getLogger(__name__)


def build_model(
    run: RunArguments,
    training: OmniTrainingArguments,
    config: LongcatOmniConfig,
    tokens: SpecialTokens,
    load: Callable[[nn.Module], None],
) -> nn.Module:
    """Return the model, with the weights that `load` puts in, and what is to be trained.

    `training` exists before it: under ZeRO-3 every layer is divided as soon as it is made.
    Without DeepSpeed, which keeps float32 copies of what it trains, weights stay float32 and
    Trainer computes in bfloat16.
    """
    dtype = torch.bfloat16 if training.bf16 and training.deepspeed else torch.float32
    context = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
        context = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    with context, default_dtype(dtype):
        model = LongcatOmniForCausalLM(config, run.loss_weights, tokens).to(dtype)
    load(model)
    if run.tuning == "lora":
        model = add_lora(
            model,
            r=run.lora_r,
            alpha=run.lora_alpha,
            dropout=run.lora_dropout,
            targets=run.lora_target_modules,
        )
        train_more(model, run)
    logger.info("%s parameters are trained", f"{count_trainable(model):,}")
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in this dtype meanwhile. ZeRO-3 rounds a tensor only when it is whole: a layer's
    experts would take 77 GB of a GPU at the peak, not 26."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train_more(model: nn.Module, run: RunArguments) -> None:
    """Make trainable what is trained beside the adapters."""
    chosen = ("vision_projector.", "audio_projector.") if run.train_projectors else ()
    if run.train_audio_heads:
        chosen += ("audio_embedding.", "speech_heads.")
    for name, param in model.named_parameters():
        if name.removeprefix("base_model.model.").startswith(chosen):
            param.requires_grad_(True)
