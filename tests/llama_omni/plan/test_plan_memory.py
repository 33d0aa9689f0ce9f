"""Predicted memory: parameter counts of the real model, peaks counted in real steps and by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from llama_omni import stage1_trainer, stage2_trainer
from llama_omni.dataset.batch import IGNORE_INDEX, SPEECH_TOKEN_INDEX, Batch
from llama_omni.dataset.lengths import Lengths, SampleLength
from llama_omni.model import speech_encoder, speech_projector
from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM, build_model_config
from llama_omni.model.sizes import (
    INNER_SIZE,
    MAX_STATES,
    ModelSizes,
    count_parameters,
    load_sizes,
)
from llama_omni.options.config import load_config
from llama_omni.plan import __main__ as plan
from llama_omni.plan.inputs import GIB, batch_size, parse_machine
from llama_omni.plan.memory import predict_memory
from llama_omni.train import enable_checkpointing
from llama_omni.training.distributed import init_processes
from llama_omni.training.loop import train_step
from llama_omni.training.parallel import TorchEngine
from tests.benchmarks.llama_omni.memory_tracker import MemoryTracker

FOLDER = Path(plan.__file__).parents[1]
CONFIGS = {stage: str(FOLDER / f"configs/stage{stage}_config.json") for stage in (1, 2)}
SIZES = ModelSizes(
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=600,
    speech_encoder_hidden_size=128,
    speech_encoder_layers=2,
    mel_size=80,
    ctc_decoder_config="(2,256,8,688)",
    unit_vocab_size=100,
)
TOKENS, ANSWER, FRAMES, UNITS = 100, 18, 240, 200
FIXED = Lengths((SampleLength((FRAMES / 100,), TOKENS - 24, ANSWER, UNITS),), 1, "one length")


def config_of(stage: int, *options: str):
    return load_config([CONFIGS[stage], *options])


def tiny_config(stage: int, *options: str):
    return config_of(
        stage, "--per_device_train_batch_size", "4", "--global_batch_size", "8",
        "--ctc_decoder_config", SIZES.ctc_decoder_config, "--unit_vocab_size", "100", *options,
    )  # fmt: skip


def build(config) -> tuple[Any, Any]:
    """Builds the real model of SIZES on the meta device, and its stage's module."""
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size",
    )  # fmt: skip
    base = LlamaConfig(**{name: getattr(SIZES, name) for name in names})
    encoder = {
        name: getattr(SIZES, name)
        for name in ("mel_size", "speech_encoder_hidden_size", "speech_encoder_layers")
    }
    with torch.device("meta"):
        model = OmniSpeech2SLlamaForCausalLM(build_model_config(base, encoder, config))
    if config.lora_enable:
        stage1_trainer.add_lora(model, config)
    stage = stage1_trainer if config.stage == 1 else stage2_trainer
    stage.set_trainable(model, config)
    return model, stage


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, ()),
        (1, ("--lora_enable", "true", "--lora_r", "8")),
        (1, ("--tune_speech_encoder", "true")),
        (1, ("--tune_speech_projector", "true")),
        (1, ("--freeze_backbone", "true")),
        (2, ()),
    ],
)
def test_counts_equal_the_models(stage: int, options: tuple[str, ...]) -> None:
    config = tiny_config(stage, *options)
    model, _ = build(config)
    found: dict[str, tuple[int, int]] = {}
    for name, param in model.named_parameters():
        parts = ("speech_encoder", "speech_projector", "speech_generator")
        part = next((p for p in parts if p in name), "language model")
        total, trained = found.get(part, (0, 0))
        count = param.numel()
        found[part] = (total + count, trained + count * param.requires_grad)
    assert count_parameters(config, SIZES) == found


def test_counts_equal_the_measured_run() -> None:
    """The log of the real run says 8030.3M, 637.0M and 21.5M; the decoder 425.6M by the paper."""
    config = config_of(1)
    sizes = load_sizes(config)
    assert sizes.language_model == 8_030_261_248
    assert round(sizes.encoder / 1e5) == 6370
    assert round(sizes.projector / 1e5) == 215
    assert round(sizes.generator / 1e5) == 4256


def test_constants_are_the_codes() -> None:
    assert INNER_SIZE == speech_projector.INNER_SIZE
    assert MAX_STATES == speech_encoder.MAX_STATES


@pytest.fixture
def process_group():
    was_there = dist.is_initialized()
    device = init_processes()
    yield device
    if not was_there:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("stage", "options", "tolerance"),
    [
        (1, ("--parallel", "fsdp2"), 0.03),
        (1, ("--parallel", "fsdp2", "--gradient_checkpointing", "false"), 0.03),
        (1, ("--parallel", "fsdp2", "--optimizer_precision", "bf16_stochastic"), 0.03),
        (1, ("--parallel", "fsdp2", "--lora_enable", "true", "--lora_dropout", "0.0"), 0.05),
        (1, ("--parallel", "ddp"), 0.03),
        (2, ("--parallel", "ddp"), 0.03),
        (2, ("--parallel", "fsdp2"), 0.03),
        (2, ("--parallel", "ddp", "--optimizer_precision", "8bit"), 0.03),
        # CTC's backward keeps its beta to itself here; on a GPU it is allocated.
        (2, ("--parallel", "ddp", "--gradient_checkpointing", "false"), 0.07),
    ],
)
def test_peak_equals_the_counted_one(
    process_group: torch.device, stage: int, options: tuple[str, ...], tolerance: float
) -> None:
    config = tiny_config(stage, *options)
    torch.manual_seed(0)
    model, module = build(config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)

    @torch.no_grad()
    def init(wrapped) -> None:
        for param in wrapped.parameters():
            getattr(param, "_local_tensor", param).normal_(0, 0.02)

    engine = TorchEngine(
        model, config, torch.device("cpu"), strategy=config.parallel, load_weights=init,
        groups=lambda wrapped: module.parameter_groups(wrapped, config),
    )  # fmt: skip
    model.train()
    objective = module.build_objective(config)

    def make_batch() -> Batch:
        ids = torch.randint(0, 500, (4, TOKENS))
        ids[:, 10 : 10 + FRAMES // 10] = SPEECH_TOKEN_INDEX
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -ANSWER:] = ids[:, -ANSWER:]
        units = torch.randint(0, 100, (4, UNITS)) if stage == 2 else None
        return Batch(ids, labels, torch.randn(4, 80, FRAMES), torch.full((4,), FRAMES), units)

    train_step(engine, objective, [make_batch(), make_batch()], global_step=0)
    states = [v for s in engine.optimizer.state.values() for v in s.values()]
    tracker = MemoryTracker([*model.parameters(), *filter(torch.is_tensor, states)])
    with tracker:
        train_step(engine, objective, [make_batch(), make_batch()], global_step=1)
    predicted = predict_memory(config, SIZES, FIXED, 1).peak
    assert predicted == pytest.approx(tracker.peak, rel=tolerance)


def measured_lengths(tokens: float = 81.4, *, units: float = 7) -> Lengths:
    """Returns those of measure_gpu.py (tests/benchmarks): 62 prompt tokens, and `tokens` of an
    answer, each of `units`. Its answers had 81 +- 20 tokens at first, later 41 +- 10."""
    rng = random.Random(0)
    samples = []
    for _ in range(1280):
        answer = max(6, round(rng.gauss(tokens, tokens / 4)))
        clip = min(15.0, max(2.0, rng.gauss(7.5, 2.5)))
        samples.append(SampleLength((clip,), 62 + answer, answer, round(answer * units)))
    return Lengths(tuple(samples), 1280, "measure_gpu")


@pytest.mark.parametrize(
    ("stage", "options", "tokens", "gib"),
    [
        (1, ("32", "fp32_master"), 41, 125.2),
        (1, ("8", "fp32_master"), 81.4, 129.2),
        (1, ("32", "bf16_stochastic"), 81.4, 69.3),
        (1, ("8", "fp32_master", "--lora_enable", "true"), 81.4, 23.0),
        (2, ("32", "fp32_master"), 41, 36.3),
        (2, ("8", "fp32_master"), 41, 26.3),
        (1, ("32", "bf16_stochastic"), 41, 69.3),
        (1, ("32", "8bit"), 41, 54.3),
        (2, ("32", "bf16_stochastic"), 41, 31.9),
        (2, ("32", "8bit"), 41, 31.1),
    ],
)
def test_measured_peaks(stage: int, options: tuple[str, ...], tokens: float, gib: float) -> None:
    """Predicts every row of the tables in MEASUREMENTS.md."""
    size, precision, *more = options
    config = config_of(
        stage, "--per_device_train_batch_size", size, "--optimizer_precision", precision, *more
    )
    lengths = measured_lengths(tokens, units=13.5 if stage == 2 else 7)
    memory = predict_memory(config, load_sizes(config), lengths, 1)
    tolerance = 0.04 if precision == "8bit" else 0.03
    assert memory.peak / GIB == pytest.approx(gib, rel=tolerance)


def test_measured_run() -> None:
    """One H200, 2026-11-22: peak 129.2 GiB, 264 padded tokens and 15.46 samples/s at MFU 0.190."""
    config = config_of(1)
    sizes = load_sizes(config)
    memory = predict_memory(config, sizes, measured_lengths(), 1)
    assert memory.peak / GIB == pytest.approx(129.2, rel=0.01)
    expected = batch_size(measured_lengths(), config, is_largest=False)
    assert expected.tokens == pytest.approx(264, rel=0.02)
    text = plan.describe(plan.Plan(config, sizes, measured_lengths(), parse_machine("h200x1")))
    rate = float(text.split(" samples/s")[0].rsplit(" ", 1)[1])
    assert rate == pytest.approx(15.46, rel=0.03)


def test_peak_by_hand() -> None:
    """fp32 masters: 16 B a trained weight, 2 B a frozen one; the root's reduction twice 4 B."""
    config = config_of(1)
    sizes = load_sizes(config)
    memory = predict_memory(config, sizes, Lengths.paper(), 1)
    root = 2 * 128256 * 4096 + 4096 + 21_501_952
    assert sizes.projector == 21_501_952
    trained = sizes.language_model + sizes.projector
    assert memory.phase == "reduction of the root unit's gradients"
    assert memory.parts["optimizer states"] == 8 * trained
    assert memory.parts["reduction input"] == 4 * root
    assert memory.peak == 16 * trained + 2 * sizes.encoder + 8 * root


def test_logits_and_layer_inputs_by_hand() -> None:
    """Batch 8 of 100 tokens, 18 of them answers; LoRA keeps the root's gradients small."""
    config = tiny_config(1, "--lora_enable", "true", "--per_device_train_batch_size", "8")
    sizes = replace(SIZES, vocab_size=60000)
    memory = predict_memory(config, sizes, FIXED, 1)
    assert memory.phase == "loss"
    assert memory.parts["logits and cross-entropy"] == 12 * 8 * 18 * 60000
    assert memory.parts["kept for backward"] == 4 * 8 * 100 * 256 * 2
    assert memory.parts.get("gradients", 0) == 0  # one micro-batch a step: none exist yet


def test_memory_is_monotonic() -> None:
    options = ("--global_batch_size", "null", "--gradient_accumulation_steps", "1")
    for stage, precision in product((1, 2), ("fp32_master", "bf16_stochastic", "8bit")):
        base = config_of(stage, *options, "--optimizer_precision", precision)
        sizes = load_sizes(base)

        def peak(gpus: int = 1, base=base, sizes=sizes, **changes: object) -> int:
            config = replace(base, **{"parallel": "fsdp2", **changes})  # pyright: ignore
            return predict_memory(config, sizes, Lengths.paper(), gpus).peak

        peaks = [peak(per_device_train_batch_size=size) for size in (1, 8, 32, 128)]
        assert peaks == sorted(peaks)
        assert peak(1) > peak(2) > peak(4) > peak(8)
        assert peak(gradient_checkpointing=False) >= peak()
        assert peak(gradient_accumulation_steps=2) >= peak()
        assert peak(pad_audio_to_30s=True) >= peak()
    order = [
        predict_memory(config_of(1, "--optimizer_precision", name), sizes, Lengths.paper(), 1).peak
        for name in ("8bit", "bf16_stochastic", "fp32_master")
    ]
    assert order == sorted(order)


def test_full_training_cannot_run_on_24_gb() -> None:
    smallest = config_of(1, "--optimizer_precision", "8bit", "--per_device_train_batch_size", "1")
    sizes = load_sizes(smallest)
    # 2 B of weight, 2 of gradient, 2 of state already make 48 GB.
    assert predict_memory(smallest, sizes, Lengths.paper(), 1).peak > 48e9


@pytest.mark.parametrize("file", ["ds_zero2_config.json", "ds_zero3_config.json"])
def test_zero_shards(file: str) -> None:
    config = config_of(1, "--deepspeed", str(FOLDER / "configs" / file))
    sizes = load_sizes(config)
    one, four = (predict_memory(config, sizes, Lengths.paper(), gpus) for gpus in (1, 4))
    assert config.choose_strategy(has_gpu=True, world_size=1) == "deepspeed"
    assert four.parts["master weights and states"] * 4 == one.parts["master weights and states"]
    is_sharded = four.parts["weights"] * 4 == one.parts["weights"]
    assert is_sharded == ("zero3" in file)
