"""One run, from options to the saved adapter: checks, data, model, Trainer.

train_ds.py hands over its command line and what a conversation says.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, set_seed
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from vss_longcat_omni.dataset.examples import VssDataset
from vss_longcat_omni.dataset.folders import find_samples, find_split
from vss_longcat_omni.dataset.prepare import Settings, locked, prepare
from vss_longcat_omni.dataset.special_tokens import read_special_tokens
from vss_longcat_omni.media.pixels import PixelConfig
from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
from vss_longcat_omni.model.lora import add_lora, count_trainable
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.hub import resolve_artifact
from vss_longcat_omni.options.training_arguments import parse_arguments
from vss_longcat_omni.plan.__main__ import check_fits
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.speech.fit_codec import fit_codec
from vss_longcat_omni.training.trainer import OmniTrainer, find_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from vss_longcat_omni.dataset.conversation import Turn
    from vss_longcat_omni.dataset.folders import Sample
    from vss_longcat_omni.dataset.special_tokens import SpecialTokens
    from vss_longcat_omni.model.config import LongcatOmniConfig
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

logger = logging.getLogger(__name__)


def train(words: Sequence[str], converse: Callable[..., list[Turn]]) -> None:
    """Trains as the command line says, on conversations that `converse` makes of the samples.

    Raises:
        ValueError, FileNotFoundError: an option, a file or a folder that cannot be used.
    """
    run, training = parse_arguments(list(words))
    signal.signal(signal.SIGUSR1, stop_early)
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING)
    set_seed(training.seed)
    notice_optimizer_offload()
    if training.deepspeed and training.should_log:
        notice_locks()
    check_fits(run, training)  # the released model: before 1.1 TB are downloaded
    folder = resolve_artifact(run.model_name_or_path, field="model_name_or_path")
    config = load_config(folder)
    check_fits(run, training, config)
    datasets = build_datasets(run, training, folder, config, converse)
    if run.prepare_only:
        return
    resume_from = training.resume_from_checkpoint
    if resume_from:
        resume_from = str(find_checkpoint(Path(str(training.output_dir)), resume_from))

    def fill(model: nn.Module) -> None:
        load_weights(model, CheckpointReader(folder), show_progress=training.should_log)

    tokens = datasets["training"].tokens
    model = build_model(run, training, config, tokens, fill)
    trainer = OmniTrainer(
        model,
        training,
        run,
        model_folder=folder,
        train_dataset=datasets["training"],
        eval_dataset=datasets.get("test"),
        tokenizer=datasets["training"].tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    if trainer.stop.has_stopped:
        logger.warning("stopped; go on with --resume_from_checkpoint latest")
        return
    # On all processes: they gather the adapters together. It uploads them too, where that is asked.
    trainer.save_model()


def stop_early(number: int, _: Any) -> None:
    """Until the Trainer takes the signal over there is nothing to save but the cache, which stays.
    Without an error: run_deepspeed.sh then queues the job again."""
    signal.signal(number, signal.SIG_IGN)  # one that comes once more would break the ending
    logger.warning("signal %d before the training began: nothing to save; stopping", number)
    raise SystemExit(0)


def build_datasets(
    run: RunArguments,
    training: OmniTrainingArguments,
    folder: Path,
    config: LongcatOmniConfig,
    converse: Callable[..., list[Turn]],
) -> dict[str, VssDataset]:
    """The training set, and the test set where there is one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = read_special_tokens(tokenizer)
    pixels = PixelConfig.from_dict(
        config.vision_config or {}, source=f"{folder}/vision/config.json"
    )
    pixels = dataclasses.replace(pixels, max_vision_length=run.max_vision_tokens)
    data_dir, cache_dir = Path(run.data_dir), Path(run.cache_dir)
    samples = {"training": find_samples(data_dir)}
    if has_split(data_dir, "test"):
        samples["test"] = find_samples(data_dir, "test")
    settings = Settings(
        pixels=pixels,
        model_folder=folder,
        frame_sampling=run.frame_sampling,  # pyright: ignore[reportArgumentType]
        use_audio_track=run.use_audio_track,
    )
    codec = open_codec(str(find_codec(run, samples["training"])), device=training.device)
    largest = max(codec.book_sizes) + tokens.codec.offset
    if largest > config.audio_vocab_size:
        raise ValueError(
            f"codec: its codes go up to {largest:,}, but the model's audio tables have "
            f"audio_vocab_size={config.audio_vocab_size:,} rows. Take a codec with smaller books."
        )
    converse = partial(converse, system_prompt=run.system_prompt)
    num_workers = max(1, len(os.sched_getaffinity(0)))
    return {
        split: VssDataset(
            prepare(found, settings, codec, cache_dir, num_workers=num_workers),
            converse,
            tokenizer,
            tokens=tokens,
            pixels=pixels,
            use_transcripts=run.transcripts == "file",
            show_progress=training.should_log,
        )
        for split, found in samples.items()
    }


def notice_optimizer_offload() -> None:
    zero = (deepspeed_config() or {}).get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        logger.warning(
            "offload_optimizer is honoured, but for LoRA it saves 2.5 GB in all and slows each "
            "step: better left out of the DeepSpeed config."
        )


def notice_locks() -> None:
    """A process that was killed while it built an operator leaves its lock, for which the next one
    waits without a word."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for lock in folder.glob("**/lock"):
        logger.warning(
            "%s: an operator of DeepSpeed is being built, and this run waits for it. If no process "
            "builds it, one was killed there: remove the file.",
            lock,
        )


def has_split(data_dir: Path, split: str) -> bool:
    try:
        find_split(data_dir, split)
    except ValueError:
        return False
    return True


def find_codec(run: RunArguments, samples: Sequence[Sample]) -> Path:
    """The codec asked for; else the embedded one, fitted to these answers where it is not yet."""
    if run.codec is not None:
        return resolve_artifact(run.codec, field="codec")
    cache_dir = Path(run.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / "codec"
    with locked(cache_dir / "codec.lock"):
        if not folder.is_dir():
            fit_codec([sample.output_audio for sample in samples], folder)
    return folder


def build_model(
    run: RunArguments,
    training: OmniTrainingArguments,
    config: LongcatOmniConfig,
    tokens: SpecialTokens,
    fill: Callable[[nn.Module], None],
) -> nn.Module:
    """The model that `fill` gives its weights, and what is to be trained.

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
    fill(model)
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
    """Of what is made meanwhile. ZeRO-3 rounds a tensor only when it is whole: a layer's experts
    would take 77 GB of a GPU for a moment, not 26."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train_more(model: nn.Module, run: RunArguments) -> None:
    """What is trained beside the adapters."""
    chosen = ("vision_projector.", "audio_projector.") if run.train_projectors else ()
    if run.train_audio_heads:
        chosen += ("audio_embedding.", "speech_heads.")
    for name, param in model.named_parameters():
        if name.removeprefix("base_model.model.").startswith(chosen):
            param.requires_grad_(True)
