"""Phase 2: trains the transformer, all of it, on the caches that `precompute` made.

    accelerate launch --num_processes=8 --mixed_precision=bf16 \
        -m longcat_video_fft.train --config longcat_video_fft/training_config.json
    scripts/launch_training.sh [--dry-run] [--resume latest] [key=value ...]

Read next: options/config.py, dataset/latents.py, model/transformer.py, model/flow_matching.py,
training/parallel.py, training/loop.py.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.options.config_rules import check_model, check_world
from longcat_video_fft.options.launch import start_logging
from longcat_video_fft.options.launcher_rules import check_launcher
from longcat_video_fft.options.load import read_configs

if TYPE_CHECKING:
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig

logger = logging.getLogger("longcat_video_fft")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    is_main = os.environ.get("RANK", "0") == "0"
    start_logging(is_main=is_main)
    try:
        config, data = read_configs(
            [option.replace("--dry-run", "--dry_run") for option in argv], plans=True
        )
        if not config.dry_run:
            check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
            check_launcher(config, os.environ)
    except ValueError as error:
        if is_main:  # all processes find the same
            sys.stderr.write(f"error: {error}\n")
        return 2
    # Heavy imports wait until the config is known to be sound.
    if config.dry_run:
        from longcat_video_fft.plan.dry_run import dry_run

        return dry_run(config, data) if is_main else 0
    from longcat_video_fft.training.loop import NonFiniteError

    try:
        run(config, data)
    except (ValueError, OSError, NonFiniteError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        _leave()
    return 0


def run(config: TrainConfig, data: DataConfig) -> None:
    """Does one run, in the order data flows; every process calls it."""
    import torch
    from tqdm.contrib.logging import logging_redirect_tqdm

    from longcat_video_fft.dataset.latents import LatentDataset
    from longcat_video_fft.model.attention_kernels import chosen_backend
    from longcat_video_fft.model.loading import build_transformer, find_transformer, load_weights
    from longcat_video_fft.precompute.job import ensure_caches
    from longcat_video_fft.precompute.processes import Processes
    from longcat_video_fft.training.checkpoint import (
        Checkpointer,
        check_disk,
        find_checkpoint,
        load_checkpoint,
    )
    from longcat_video_fft.training.distributed import init_processes, is_main_process
    from longcat_video_fft.training.export import export_model, find_companions
    from longcat_video_fft.training.loop import train
    from longcat_video_fft.training.parallel import Engine
    from longcat_video_fft.training.validation import Validation, read_prompts
    from longcat_video_fft.training.video_log import open_tracker

    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    dit_folder = find_transformer(config)
    find_companions(config, output_dir)  # now, not when the export at the end needs them
    read_prompts(config)

    # Data: phase 1 first where it is not done.
    with logging_redirect_tqdm():
        ensure_caches(config, data, Processes())
    device = init_processes()
    torch.manual_seed(config.seed)
    dataset = LatentDataset(
        data,
        batch_size=config.train_batch_size,
        seed=config.seed,
        max_tokens=config.max_text_tokens,
        num_held_out=config.num_held_out_samples,
    )
    check_captions(dataset, dit_folder)

    # Model.
    model: Any = build_transformer(dit_folder)
    check_model(config, model.config)
    validation = Validation(config, dataset, output_dir)
    if is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        check_disk(model, config, output_dir)
    engine = Engine(
        model,
        config,
        device,
        load_weights=lambda m: load_weights(
            m, dit_folder, seed=config.seed, init=config.transformer_init
        ),
    )
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    logger.info(
        "attention by %s",
        chosen_backend(engine.attention_mechanism, model.head_dim, dtype, device),
    )
    logger.info(
        "%.2fB parameters, all trained; %s on %d processes, %d samples a step",
        sum(p.numel() for p in model.parameters()) / 1e9, config.optimizer,
        torch.distributed.get_world_size(),
        config.train_batch_size * config.gradient_accumulation_steps * engine.dp_size,
    )  # fmt: skip

    # Training.
    identity = dict(model.config)
    start_step = load_checkpoint(engine, checkpoint, identity) if checkpoint else 0
    if checkpoint:
        logger.info("resumed from %s", checkpoint)
    checkpointer = Checkpointer(
        engine, output_dir, keep_last=config.checkpoints_total_limit, identity=identity
    )
    tracker = open_tracker(config, output_dir, start_step=start_step)
    engine.module.train()
    try:
        with logging_redirect_tqdm():
            is_finished = train(
                engine,
                dataset,
                config,
                checkpointer=checkpointer,
                tracker=tracker,
                evaluate=lambda step: validation.run(engine, step, tracker),
                start_step=start_step,
            )
    finally:
        checkpointer.drain()
        tracker.close()
    if is_finished:
        export_model(engine, config, output_dir)
        logger.info("the model is in %s", output_dir)


def check_captions(dataset: Any, dit_folder: Path) -> None:
    """Raises ValueError when the cache's captions are not of the width that the model takes."""
    wanted = json.loads((dit_folder / "config.json").read_text("utf-8"))["caption_channels"]
    found = dataset.empty_caption()[0].shape[-1]
    if found != wanted:
        raise ValueError(
            f"{dataset.text_cache.storage.location}: its captions have {found} channels and "
            f"{dit_folder}/config.json takes caption_channels={wanted}. The cache was made by "
            "another text encoder: give another cache_dir, or the model that belongs to it."
        )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
