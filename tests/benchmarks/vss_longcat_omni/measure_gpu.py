"""Times real layers of LongCat-Flash at the released widths, with random weights, on one GPU.

    python3 -m tests.benchmarks.vss_longcat_omni.measure_gpu --layers 1 --tokens 8192 [--samples 4]
    [--profile]

Prints milliseconds a layer, forward and backward to the activations; the weights are frozen, as in
LoRA training, resident and bfloat16. --lora adds adapters, --checkpoint recomputes.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.language_model import LongcatFlashModel
from vss_longcat_omni.model.lora import add_lora
from vss_longcat_omni.options.lora_targets import LORA_TARGETS

BACKENDS = {
    "any": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}


def build(layers: int) -> LongcatFlashModel:
    """Random weights, small enough that activations stay finite."""
    config = LongcatOmniConfig(num_layers=layers, vocab_size=256)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LongcatFlashModel(config)
    torch.set_default_dtype(torch.float32)
    for param in model.parameters():
        if param.ndim > 1:
            param.data.normal_(0.0, 0.006)
    return model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=1, help="equal sequences in the pack")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backend", choices=list(BACKENDS), default="any")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    model = build(options.layers)
    base = model
    if options.lora:
        add_lora(model, r=32, alpha=64, dropout=0.05, targets=LORA_TARGETS)
    base.checkpoint_every = int(options.checkpoint)
    base.train()
    length = options.tokens // options.samples
    lengths = [length] * options.samples
    positions = torch.arange(length, device="cuda").repeat(options.samples)
    embeds = torch.randn(sum(lengths), 6144, device="cuda", dtype=torch.bfloat16)
    embeds.requires_grad_()

    def step() -> None:
        embeds.grad = None
        base(embeds, positions, lengths).float().pow(2).mean().backward()

    with sdpa_kernel(BACKENDS[options.backend], set_priority=True):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(options.steps):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / options.layers)
        times.sort()
        assert embeds.grad is not None
        is_finite = bool(torch.isfinite(embeds.grad).all())
        sys.stdout.write(
            f"{vars(options)}: {times[len(times) // 2]:.1f} ms a layer (of {times[0]:.1f} to "
            f"{times[-1]:.1f}), peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, finite "
            f"{is_finite}\n"
        )
        if options.profile:
            activity = torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[activity]) as profile:
                step()
                torch.cuda.synchronize()
            table = profile.key_averages().table(
                sort_by="cuda_time_total", row_limit=40, max_name_column_width=90
            )
            sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
