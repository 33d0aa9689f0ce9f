"""Memory, disk and time of a run, before anything is downloaded or loaded.

    python -m vss_longcat_omni.plan --gpus 8 --gpu h200 --host_ram 512G --ds_config ds_config.json

Needs no GPU and no weights: the layout asked, line by line, then its alternatives, each with fits
or does not fit. train_ds.py makes the same plan for the machine it runs on (`check_fits`) and stops
where it does not fit. Shapes and machines come from inputs.py, memory from memory.py, seconds from
time.py, words from report.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vss_longcat_omni.plan.inputs import (
    GPUS,
    RELEASED,
    Gpu,
    Job,
    Machine,
    find_config,
    find_gpu,
    job_of,
    load_sizes,
    parse_bytes,
    read_zero_settings,
)
from vss_longcat_omni.plan.layout import GPUS_OF_A_NODE, Plan, options
from vss_longcat_omni.plan.report import describe

if TYPE_CHECKING:
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

logger = logging.getLogger(__name__)


def plan_run(
    run: RunArguments,
    training: OmniTrainingArguments,
    config: LongcatOmniConfig,
    *,
    gpus: int,
    gpu_memory: float | None,
    host_memory: float | None,
    nodes: int = 1,
    gpu: Gpu | None = None,
) -> Plan:
    """The plan of train_ds.py's own settings on a machine.

    Args:
        gpus: of all nodes together.
        gpu_memory: bytes of one; None: the processes run on CPUs.
        host_memory: bytes of one node; None: not looked at.
        gpu: for the times; None: none are told.

    Raises:
        ValueError: a DeepSpeed config that cannot be read, or GPUs that the nodes cannot share.
    """
    machine = Machine(gpus=gpus, nodes=nodes, gpu=gpu, gpu_bytes=gpu_memory, host_bytes=host_memory)
    return Plan(job_of(run, training, config.hidden_size), load_sizes(config), machine)


def check_fits(
    run: RunArguments, training: OmniTrainingArguments, config: LongcatOmniConfig | None = None
) -> Plan | None:
    """The plan on this machine, made by every process alike.

    Without `config` it is of the folder or of the released model; None for another hub id, whose
    config.json is not here yet.

    Raises:
        ValueError: it does not fit: what is missing, and what would fit. With run.force a warning.
    """
    config = config or find_config(run.model_name_or_path)
    if config is None:
        return None
    gpu_memory, gpu = None, None
    if training.device.type == "cuda":
        properties = torch.cuda.get_device_properties(training.device)
        gpu_memory, gpu = properties.total_memory, find_gpu(properties.name)
    world = training.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    plan = plan_run(
        run,
        training,
        config,
        gpus=world,
        gpu_memory=gpu_memory,
        host_memory=host_memory(),
        nodes=world // local if world % local == 0 else 1,
        gpu=gpu,
    )
    if plan.problems and not run.force:
        raise ValueError(refusal(plan))
    for problem in plan.problems:
        logger.warning("trained by --force, although the plan says that %s", problem)
    return plan


def refusal(plan: Plan) -> str:
    fitting = [label for label, other in options(plan) if not other.problems]
    instead = f"What would fit: {'; '.join(fitting)}." if fitting else "No other setting fits."
    return (
        f"this run does not fit on {plan.machine.name}: {'; '.join(plan.problems)}. {instead} "
        "`python -m vss_longcat_omni.plan` shows the whole reckoning; --force true trains anyway."
    )


def host_memory() -> int:
    """Bytes that this machine or its container has."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        has = min(has, int(text))
    return has


def build_parser() -> argparse.ArgumentParser:
    """Defaults of the run are those of options/training_arguments.py, slow to import."""
    parser = argparse.ArgumentParser(
        description="Memory, disk and time of a LongCat-Flash-Omni training, estimated."
    )
    add = parser.add_argument
    add("--gpus", type=int, default=8, help="of all nodes together")
    add("--nodes", type=int, help=f"default: one for every {GPUS_OF_A_NODE} GPUs")
    add("--gpu", default="h200", help=", ".join(GPUS))
    add("--gpu_memory", help="of one GPU, as 80G; default: by its name")
    add("--host_ram", default="512G", help="of a node")
    add("--ds_config", default="ds_config.json", help='DeepSpeed config; "" for none')
    add("--model_name_or_path", default=RELEASED, help="a folder; its config alone is read")
    add("--max_tokens", type=int, default=Job.max_tokens, help="of a GPU's micro-step")
    add("--lora_r", type=int, default=Job.lora_r)
    add("--gradient_accumulation_steps", type=int, default=Job.grad_accum_steps)
    add("--nvme_gbps", type=float, default=7.0, help="GB/s that one drive reads")
    add("--nvme_drives", type=int, default=1, help="of a node")
    add("--network_gbps", type=float, default=400.0, help="GB/s between nodes, of a node")
    return parser


def plan_options(options: argparse.Namespace) -> Plan:
    """Raises ValueError: a value that cannot be, a file that cannot be read."""
    counts = ("gpus", "max_tokens", "lora_r", "gradient_accumulation_steps", "nvme_drives")
    for name in (*counts, "nvme_gbps", "network_gbps"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} {getattr(options, name)}: give more than 0.")
    config = find_config(options.model_name_or_path)
    if config is None:
        raise ValueError(
            f"--model_name_or_path {options.model_name_or_path}: no such folder; give one with the "
            f"model's config.json, or leave it out for {RELEASED}."
        )
    gpu = find_gpu(options.gpu)
    if options.gpu_memory is not None:
        gpu_bytes = parse_bytes(options.gpu_memory, "gpu_memory")
    elif gpu is not None:
        gpu_bytes = gpu.num_bytes
    else:
        raise ValueError(
            f"--gpu {options.gpu}: choose one of {', '.join(GPUS)}, or say --gpu_memory as well."
        )
    machine = Machine(
        gpus=options.gpus,
        nodes=math.ceil(options.gpus / GPUS_OF_A_NODE) if options.nodes is None else options.nodes,
        gpu=gpu,
        gpu_bytes=gpu_bytes,
        host_bytes=parse_bytes(options.host_ram, "host_ram"),
        nvme_rate=options.nvme_gbps * options.nvme_drives * 1e9,
        network_rate=options.network_gbps * 1e9,
    )
    job = Job(
        zero=read_zero_settings(options.ds_config, config.hidden_size),
        max_tokens=options.max_tokens,
        lora_r=options.lora_r,
        grad_accum_steps=options.gradient_accumulation_steps,
    )
    return Plan(job, load_sizes(config), machine)


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        plan = plan_options(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(describe(plan) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
