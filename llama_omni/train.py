"""Trains either stage of LLaMA-Omni.

    python train.py configs/stage1_config.json --data_path DATA --output_dir OUT
    torchrun --nproc_per_node 4 train.py configs/stage1_config.json ...
    accelerate launch --config_file configs/accelerate_fsdp2.yaml train.py configs/...
    deepspeed train.py configs/stage1_config.json --deepspeed configs/ds_zero2_config.json ...

Read next: options/config.py, dataset/records.py, data_utils.py, model/omni.py, stage1_trainer.py,
training/loop.py.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: this folder's `evaluate.py` and others must not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # shadow packages of those names

from llama_omni.options.config import TrainConfig, load_config
from llama_omni.options.rules import validate_config

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("llama_omni")

SPEECH_PARTS = ("speech_encoder", "speech_projector", "speech_generator")


def main(argv: list[str] | None = None) -> int:
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        validate_config(config)
        config.grad_accum_steps(int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # all processes find the same
            sys.stderr.write(f"error: {error}\n")
        return 2
    # Heavy imports wait until the config is known to be sound.
    from llama_omni.training.distributed import init_processes, is_main_process
    from llama_omni.training.meter import NonFiniteError

    device = init_processes()
    start_logging(is_main=is_main_process())
    try:
        run(config, device)
    except (ValueError, FileNotFoundError, NonFiniteError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        _leave()
    return 0


def start_logging(*, is_main: bool) -> None:
    """Sets up the log: the main process reports all, the others errors alone."""
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for library in ("httpx", "httpx2"):  # a line a request
        logging.getLogger(library).setLevel(logging.WARNING)


def run(config: TrainConfig, device: torch.device) -> None:
    """Runs one stage, in the order data flows; every process calls it."""
    import torch
    import torch.distributed as dist
    from tqdm.contrib.logging import logging_redirect_tqdm

    from llama_omni import stage1_trainer, stage2_trainer
    from llama_omni.data_utils import build_dataset, collate
    from llama_omni.dataset.prompt import pad_token_id
    from llama_omni.model.loading import load_weights, save_released
    from llama_omni.speech.whisper_mel import load_feature_extractor
    from llama_omni.training.checkpoint import check_disk, find_checkpoint, load_checkpoint
    from llama_omni.training.distributed import is_main_process
    from llama_omni.training.loop import train
    from llama_omni.training.parallel import compute_dtype
    from llama_omni.training.tracker import Tracker

    stage = stage1_trainer if config.stage == 1 else stage2_trainer
    objective = stage.build_objective(config)
    output_dir = Path(str(config.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    strategy = config.choose_strategy(
        has_gpu=device.type == "cuda", world_size=dist.get_world_size()
    )
    logger.info("%s; %s on %s", config.batch_arithmetic(dist.get_world_size()), strategy, device)

    # Data.
    model_folder, encoder_folder = stage.find_sources(config)
    tokenizer = load_tokenizer(model_folder)
    features = load_feature_extractor(encoder_folder, mel_size=config.mel_size)
    options = {"tokenizer": tokenizer, "features": features, "device": device}
    train_set = build_dataset(config, str(config.data_path), **options)
    eval_set = None
    if config.validation_data_path:
        eval_set = build_dataset(config, config.validation_data_path, **options)

    # Model.
    model, readers = stage.build_model(config, model_folder, encoder_folder)
    stage.set_trainable(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if is_main_process():
        check_disk(model, config, output_dir)
    engine = build_engine(
        model,
        config,
        device,
        strategy=strategy,
        load_weights=lambda m: load_weights(m, readers, seed=config.seed),
        groups=lambda m: stage.parameter_groups(m, config),
    )
    log_parameters(model)

    # Training.
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    start_step = load_checkpoint(engine, checkpoint) if checkpoint else 0
    if checkpoint:
        logger.info("resumed from %s", checkpoint)
    tracker = Tracker(
        config.report_to,
        output_dir,
        project="llama-omni",
        name=config.run_name or output_dir.name,
        tensorboard_dir=output_dir / "tensorboard",
        is_main=is_main_process(),
        start_step=start_step,
    )
    engine.module.train()
    try:
        with logging_redirect_tqdm():
            is_finished = train(
                engine,
                objective,
                train_set,
                eval_set,
                config,
                collate=partial(collate, pad_token_id=pad_token_id(tokenizer)),
                output_dir=output_dir,
                tracker=tracker,
                start_step=start_step,
            )
    finally:
        tracker.close()
    if not is_finished:
        return
    final = output_dir / "final_model"
    save_released(
        model,
        final,
        dtype=compute_dtype(config),
        is_main=is_main_process(),
        companions=(tokenizer, features),
    )
    if config.stage == 2 and is_main_process():
        stage2_trainer.add_kmeans(config, final)
    logger.info("the model is in %s", final)


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer beside a model; ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"{folder}: holds no tokenizer. Stage 1 takes a Llama folder as published, stage 2 "
            "what stage 1 left in OUT/final_model."
        ) from error


def build_engine(
    model: Any, config: TrainConfig, device: torch.device, *, strategy: str, **build: Any
) -> Any:
    """Builds the engine of the strategy; `build` holds its `load_weights` and `groups`."""
    if strategy == "deepspeed":
        from llama_omni.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device, **build)
    from llama_omni.training.parallel import TorchEngine

    return TorchEngine(model, config, device, strategy=strategy, **build)


def enable_checkpointing(model: Any) -> None:
    """Recomputes each layer in the backward pass; transformers renames the call in version 6."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def log_parameters(model: Any) -> None:
    """Logs how many parameters each part has and how many of them are trained."""
    counts: dict[str, list[int]] = {}
    for name, param in model.named_parameters():
        part = next((p for p in SPEECH_PARTS if p in name), "language model")
        total, trained = counts.setdefault(part, [0, 0])
        counts[part] = [
            total + num_elements(param),
            trained + param.requires_grad * num_elements(param),
        ]
    for part, (total, trained) in counts.items():
        logger.info("%s: %.1fM parameters, %.1fM trained", part, total / 1e6, trained / 1e6)


def num_elements(param: Any) -> int:
    """Counts the elements of the whole parameter, also where ZeRO-3 keeps a part."""
    return getattr(param, "ds_numel", param.numel())


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
