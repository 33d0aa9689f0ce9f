"""Every peak of README.md and MEASUREMENTS.md, measured on H200, against the prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.options.config_rules import check_world
from longcat_video_fft.plan.memory import GIB, model_sizes, predict_memory

FFN: dict[str, Any] = {"gradient_checkpointing_mode": "selective_ffn"}
FREE, AWAY, FP8 = "uncheckpointed_blocks", "activation_offload_blocks", {"fp8_linears": True}
# GiB allocated, blocks, GPUs, options; one micro-batch a step by default. The run of
# 99.9 GiB is left out: its commit offloaded other blocks than today's.
MEASURED: list[tuple[float, int, int, dict[str, Any]]] = [
    (122.6, 48, 2, FFN | {FREE: 20, AWAY: 14}),
    (125.7, 48, 2, FFN | {FREE: 7}),
    (127.8, 48, 1, FFN | FP8 | {FREE: 6, "optimizer": "adamw_8bit"}),
    (29.28, 8, 1, FFN),
    (34.03, 8, 1, FFN | {FREE: 4, AWAY: 6}),
    (25.60, 8, 1, FFN | {"musubi_blocks_to_swap": 2}),
    (29.57, 8, 1, FFN | {"attention_mechanism": "cudnn"}),
    (27.89, 8, 1, FFN | {AWAY: 8}),
    (47.32, 8, 1, FFN | {FREE: 4}),
    (28.65, 8, 1, FFN | FP8),
    (18.96, 4, 1, {}),
    (19.82, 4, 1, FFN),
    (38.73, 4, 1, {"gradient_checkpointing": False}),
    (18.38, 4, 1, FFN | FP8),
    (16.78, 4, 2, {"gradient_accumulation_steps": 4}),
    (16.72, 4, 2, FP8 | {"gradient_accumulation_steps": 4}),
    (22.01, 4, 2, {"fsdp_replicate_size": 2}),
    (15.96, 4, 2, {}),
    (11.74, 4, 2, {"context_parallel_size": 2, "gradient_accumulation_steps": 2}),
]


@pytest.mark.parametrize(("gib", "depth", "gpus", "options"), MEASURED)
def test_within_ten_percent(gib: float, depth: int, gpus: int, options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"gradient_accumulation_steps": 1} | options
    config = TrainConfig(**values)
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(depth=depth, text_tokens_zero_pad=True)
    world = check_world(config, gpus)
    memory = predict_memory(config, model_sizes(model), world, Bucket(93, 480, 832))
    assert memory.peak / GIB == pytest.approx(gib, rel=0.1)
