"""Reads what a plan needs beside the model's sizes: the machine, and the batches of a run."""

from __future__ import annotations

import difflib
import math
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_omni.model.flops import BatchSize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_omni.dataset.lengths import Lengths
    from llama_omni.options.config import TrainConfig

GIB = 2**30
# What torch reports as total memory (GiB), and the name that flops.PEAK_FLOPS knows.
GPUS = {
    "b200": (178.0, "B200"), "h200": (139.8, "H200"), "gh200": (94.5, "GH200"),
    "h100-80": (79.1, "H100"), "a100-80": (79.2, "A100"), "a100-40": (39.4, "A100"),
    "l40": (44.4, "L40"), "l40s": (44.4, "L40S"),
    "rtx4090": (23.5, "RTX 4090"), "rtx3090": (23.6, "RTX 3090"),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Describes a machine; `name` is that of its GPUs in GPUS, `gpu` in flops.PEAK_FLOPS."""

    name: str
    gpu: str
    count: int
    gpu_bytes: int


def parse_machine(text: str) -> Machine:
    """Parses `h200x8`, a known GPU and how many; ValueError names the nearest known GPU."""
    found = re.fullmatch(r"(.+?)x(\d+)", text.lower())
    name, count = (found[1], int(found[2])) if found else (text.lower(), 0)
    if name in GPUS and count > 0:
        memory, gpu = GPUS[name]
        return Machine(name, gpu, count, int(memory * GIB))
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"--machine {text!r}: not GPUxCOUNT. Did you mean '{near}x{count or 1}'? "
        f"Known GPUs: {', '.join(GPUS)}."
    )


def batch_size(lengths: Lengths, config: TrainConfig, *, is_largest: bool) -> BatchSize:
    """Returns one micro-batch: the largest that a run will meet, or the expected one.

    Padding goes to the longest sample. The expected longest of B samples is exact for draws from
    `lengths.samples`; the largest sum of answer tokens is taken 3 standard deviations up.
    """
    size = config.per_device_train_batch_size
    clips, tokens, frames = [], [], []
    for sample in lengths.samples:
        mel = [3000 if config.pad_audio_to_30s else 2 * math.ceil(s * 50) for s in sample.clips]
        clips += mel
        speech = sum(length // 2 // config.speech_encoder_ds_rate for length in mel)
        tokens.append(sample.text_tokens + speech)
        frames.append(max(sample.answer_tokens * config.ctc_upsample_factor, sample.units))
    answers = [sample.answer_tokens for sample in lengths.samples]
    longest = max if is_largest else lambda values: expected_longest(values, size)
    spread = 3 * math.sqrt(size) * statistics.pstdev(answers) if is_largest else 0.0
    answer_tokens = min(size * max(answers), size * statistics.fmean(answers) + spread)
    return BatchSize(
        clips=math.ceil(size * len(clips) / len(lengths.samples)),
        mel_frames=math.ceil(longest(clips)),
        sequences=size,
        tokens=math.ceil(longest(tokens)),
        answer_tokens=math.ceil(answer_tokens),
        unit_frames=math.ceil(longest(frames)) if config.stage == 2 else 0,
    )


def expected_longest(values: Sequence[float], count: int) -> float:
    """Returns the mean of the largest of `count` draws with replacement."""
    powers = [(i / len(values)) ** count for i in range(len(values) + 1)]
    return sum(v * (powers[i + 1] - powers[i]) for i, v in enumerate(sorted(values)))
