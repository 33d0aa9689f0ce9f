"""Predicts memory, disk and time of a run, before anything is downloaded or loaded.

    python -m vss_longcat_omni.plan --gpus 8 --gpu h200 --host_ram 512G --ds_config ds_config.json

Needs no GPU and no weights; exit status 1 where the run does not fit. train_ds.py makes the same
plan for the machine that it runs on (`check_fits`), and stops where it does not fit.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vss_longcat_omni.model.loading import RELEASED, find_config
from vss_longcat_omni.model.sizes import ModelSizes
from vss_longcat_omni.options.run_arguments import RunArguments
from vss_longcat_omni.options.zero_settings import read_zero_settings
from vss_longcat_omni.plan.inputs import GPUS, Setup, find_gpu
from vss_longcat_omni.plan.verdict import alternatives, describe, find_problems

if TYPE_CHECKING:
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

logger = logging.getLogger(__name__)


def check_fits(
    run: RunArguments, training: OmniTrainingArguments, config: LongcatOmniConfig | None = None
) -> Setup | None:
    """Return the run on this machine, checked by every process alike.

    Without `config` the folder's or the released model's is taken; None is returned for another hub
    id, whose config.json is not here yet. Raises ValueError where the run does not fit: what is
    missing, and what would fit; with run.force that is a warning.
    """
    config = config or find_config(run.model_name_or_path)
    if config is None:
        return None
    gpu, gpus = None, training.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or gpus)
    if training.device.type == "cuda":
        properties = torch.cuda.get_device_properties(training.device)
        gpu = find_gpu(properties.name, properties.total_memory)
    same = ("gradient_accumulation_steps", "gradient_checkpointing", "bf16",
            "dataloader_num_workers", "save_total_limit")  # fmt: skip
    setup = Setup(
        sizes=ModelSizes.of(config),
        run=run,
        zero=read_zero_settings(training.deepspeed, config.hidden_size),
        **{name: getattr(training, name) for name in same},
        gpus=gpus,
        nodes=1 if gpus % local else gpus // local,
        gpu=gpu,
        host_bytes=host_memory(),
    )
    problems = find_problems(setup)
    if problems and not run.force:
        fitting = "; ".join(map(str, alternatives(setup)))
        raise ValueError(
            f"this run does not fit ({setup}): {'; '.join(problems)}. "
            + (f"What would fit: {fitting}. " if fitting else "No other setting fits. ")
            + "`python -m vss_longcat_omni.plan` shows the parts; --force true trains anyway."
        )
    for problem in problems:
        logger.warning("trained by --force, although the plan says that %s", problem)
    return setup


def host_memory() -> int:
    """Return the bytes that this machine or its container has."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(has, int(text)) if text.isdigit() else has


def parse_bytes(text: str) -> float:
    """Parse "512G"; K, M, G and T are powers of 1024, with or without "iB" or "B" behind."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a size as 80G, 512G or 1.5T.")
    return float(match[1]) * 1024 ** (1 + "KMGT".index(match[2].upper()))


def build_parser() -> argparse.ArgumentParser:
    """Build it with the defaults of options/training_arguments.py, which is slow to import."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="of all nodes together")
    add("--nodes", type=int, help="default: one for every 8 GPUs")
    add("--gpu", default="h200", help=", ".join(GPUS))
    add("--gpu_memory", type=parse_bytes, help="of one GPU, as 80G; default: by its name")
    add("--host_ram", type=parse_bytes, default="512G", help="of a node")
    add("--ds_config", default="ds_config.json", help='DeepSpeed config; "" for none')
    add("--model_name_or_path", default=RELEASED, help="a folder; its config alone is read")
    add("--max_tokens", type=int, default=RunArguments.max_tokens, help="of a GPU's micro-step")
    add("--lora_r", type=int, default=RunArguments.lora_r)
    add("--gradient_accumulation_steps", type=int, default=Setup.gradient_accumulation_steps)
    add("--nvme_gbps", type=float, default=7.0, help="GB/s that one drive reads")
    add("--nvme_drives", type=int, default=1, help="of a node")
    add("--network_gbps", type=float, default=400.0, help="GB/s between nodes, of a node")
    return parser


def read_setup(options: argparse.Namespace) -> Setup:
    """Read a setup; raises ValueError: a value that cannot be, a file that cannot be read."""
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"--{name} {value}: give more than 0.")
    config, gpu = find_config(options.model_name_or_path), find_gpu(options.gpu, options.gpu_memory)
    if config is None:
        raise ValueError(
            f"--model_name_or_path {options.model_name_or_path}: no such folder; give one with the "
            f"model's config.json, or leave it out for {RELEASED}."
        )
    if not gpu.num_bytes:
        choices = ", ".join(GPUS)
        raise ValueError(f"--gpu {gpu.name}: choose one of {choices}, or say --gpu_memory as well.")
    return Setup(
        sizes=ModelSizes.of(config),
        run=RunArguments(max_tokens=options.max_tokens, lora_r=options.lora_r),
        zero=read_zero_settings(options.ds_config, config.hidden_size),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gpus=options.gpus,
        nodes=options.nodes or math.ceil(options.gpus / 8),
        gpu=gpu,
        host_bytes=options.host_ram,
        nvme_rate=options.nvme_gbps * options.nvme_drives * 1e9,
        network_rate=options.network_gbps * 1e9,
    )


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    try:
        setup = read_setup(parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(describe(setup) + "\n")
    return 1 if find_problems(setup) else 0


if __name__ == "__main__":
    sys.exit(main())
