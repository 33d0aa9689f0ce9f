"""Replicated parameters and their states stay equal on all processes, bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from llama_omni import stage1_trainer, stage2_trainer
from llama_omni.dataset.batch import IGNORE_INDEX, SPEECH_TOKEN_INDEX, Batch
from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM, build_model_config
from llama_omni.options.config import TrainConfig
from llama_omni.train import build_engine
from llama_omni.training.loop import train_step
from tests.llama_omni.support.spawn import spawn

pytestmark = pytest.mark.dist
PRECISIONS = ("fp32_master", "bf16_stochastic", "8bit")
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "mel_size": 8,
    "speech_encoder_hidden_size": 64,
    "speech_encoder_layers": 1,
}
ZERO2 = Path(__file__).parents[3] / "llama_omni" / "configs" / "ds_zero2_config.json"


def build(config: TrainConfig) -> tuple[Any, Any]:
    """(engine of a tiny model, its stage's module)."""
    stage = stage1_trainer if config.stage == 1 else stage2_trainer
    with torch.device("meta"):
        model = OmniSpeech2SLlamaForCausalLM(
            build_model_config(LlamaConfig(**LLAMA), WHISPER, config)
        )
    stage.set_trainable(model, config)

    @torch.no_grad()
    def init(wrapped: Any) -> None:
        for param in wrapped.parameters():
            getattr(param, "_local_tensor", param).normal_(0, 0.02)

    torch.manual_seed(0)
    engine = build_engine(
        model, config, torch.device("cpu"), strategy=config.parallel, load_weights=init,
        groups=lambda wrapped: stage.parameter_groups(wrapped, config),
    )  # fmt: skip
    return engine, stage


def make_batch(config: TrainConfig) -> Batch:
    """Noise, another on each process."""
    ids = torch.randint(0, 50, (2, 20))
    ids[:, 4:8] = SPEECH_TOKEN_INDEX
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -6:] = ids[:, -6:]
    units = torch.randint(0, 10, (2, 8)) if config.stage == 2 else None
    return Batch(ids, labels, torch.randn(2, 8, 40), torch.full((2,), 40), units)


def differing(value: torch.Tensor) -> float:
    """Returns the share of elements that differ between two processes."""
    own = value.detach().contiguous().reshape(-1).view(torch.uint8)
    other = own.clone()
    dist.broadcast(other, src=0)
    count = torch.tensor([float((own != other).sum())])
    dist.all_reduce(count)
    return count.item() / max(1, own.numel())


def train_and_compare(path: Path, strategies: list[str]) -> None:
    """Twenty steps of each stage under each strategy and precision."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed asks for it
    found: dict[str, float] = {}
    for parallel in strategies:
        for precision in PRECISIONS if parallel != "deepspeed" else PRECISIONS[:1]:
            for stage in (1, 2):
                config = TrainConfig(
                    stage=stage, parallel=parallel, optimizer_precision=precision,
                    deepspeed=str(ZERO2) if parallel == "deepspeed" else None,
                    learning_rate=1e-2, ctc_decoder_config="(1,32,4,64)", unit_vocab_size=10,
                    speech_encoder_ds_rate=5, ctc_upsample_factor=4, bf16=True,
                    tune_speech_encoder=stage == 1, freeze_backbone=stage == 2,
                    mel_size=8, speech_encoder_hidden_size=64,
                )  # fmt: skip
                engine, module = build(config)
                objective = module.build_objective(config)
                torch.manual_seed(dist.get_rank())
                for step in range(20):
                    train_step(engine, objective, [make_batch(config)], global_step=step)
                for name, param in engine.module.named_parameters():
                    assert isinstance(param, DTensor) == (parallel == "fsdp2")
                    if parallel == "fsdp2":  # nothing of it is replicated
                        assert param.placements[0].is_shard()
                        continue
                    key = f"{parallel} {precision} stage {stage} {name}"
                    found[key] = differing(param)
                    states = engine.optimizer.state.get(param, {}) if parallel == "ddp" else {}
                    for state, value in states.items():
                        found[f"{key} {state}"] = differing(value)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))


def assert_no_difference(path: Path, strategies: list[str]) -> None:
    spawn(train_and_compare, path, strategies)
    found = json.loads(path.read_text())
    assert len(found) > 20
    assert {name: share for name, share in found.items() if share > 0} == {}


def test_replicas_stay_equal(tmp_path: Path) -> None:
    """DDP and FSDP2, every precision, both stages."""
    assert_no_difference(tmp_path / "found.json", ["ddp", "fsdp2"])


@pytest.mark.long  # deepspeed is slow to import, and compiles
def test_replicas_stay_equal_with_deepspeed(tmp_path: Path) -> None:
    assert_no_difference(tmp_path / "found.json", ["deepspeed"])
