"""The plan: sharding against the real fully_shard, memory and time against numbers by hand."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from longcat_video_fft.dataset.sampler import TrainingOrder
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.options.config_rules import check_world
from longcat_video_fft.plan import dry_run
from longcat_video_fft.plan import time as plan_time
from longcat_video_fft.plan.inputs import Samples
from longcat_video_fft.plan.memory import (
    ModelSizes,
    model_sizes,
    predict_memory,
    shard_size,
    state_bytes,
)
from longcat_video_fft.training.optimizer import LowPrecisionAdamW
from longcat_video_fft.training.parallel import build_mesh, parallelize
from tests.longcat_video_fft.support.plan_samples import TINY_DIT

if TYPE_CHECKING:
    from collections.abc import Iterator

RELEASED = {"text_tokens_zero_pad": True}
LONG, SHORT = Bucket(93, 480, 832), Bucket(73, 480, 832)
# No size divides by 3 or 5; norms are wider than the number of devices, a row is not.
ODD = TINY_DIT | {"hidden_size": 112, "num_heads": 7, "adaln_tembed_dim": 17}


def build(options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return LongCatVideoTransformer3DModel(**options)


@pytest.fixture(scope="module")
def released() -> ModelSizes:
    return model_sizes(build(RELEASED))


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Makes a process group (rank, world size) in which nobody else is."""
    rank, world_size = request.param
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    yield rank, world_size
    dist.destroy_process_group()


def local_sizes(model: Any) -> list[int]:
    params = list(model.parameters())
    assert all(isinstance(param, DTensor) for param in params)
    return [param.to_local().numel() for param in params]


@pytest.mark.parametrize("fake_group", [(0, 8), (7, 8)], indirect=True)
def test_the_plan_of_the_13b_on_8_gpus_is_fully_shards(
    fake_group: tuple[int, int], released: ModelSizes
) -> None:
    """The training's own `parallelize` runs on the meta device."""
    model, config = build(RELEASED), TrainConfig()
    parallelize(model, config, build_mesh(config, torch.device("cpu")))
    assert released.num_parameters() == 13_581_071_424
    assert sum(local_sizes(model.blocks[0])) == shard_size(released.block, 8) == 35_266_624
    planned = 48 * shard_size(released.block, 8) + shard_size(released.root, 8)
    assert sum(local_sizes(model)) == planned == 13_581_071_424 // 8
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(model.blocks) == 48


@pytest.mark.parametrize("fake_group", [(0, 3), (0, 5), (2, 3)], indirect=True)
def test_uneven_rows_are_padded_to_the_first_share(fake_group: tuple[int, int]) -> None:
    rank, world_size = fake_group
    model, config = build(ODD), TrainConfig()
    sizes = model_sizes(model)
    parallelize(model, config, build_mesh(config, torch.device("cpu")))
    planned = sizes.depth * shard_size(sizes.block, world_size) + shard_size(sizes.root, world_size)
    assert planned * world_size > sizes.num_parameters()
    if rank == 0:
        assert sum(local_sizes(model)) == planned
    else:
        assert sum(local_sizes(model)) < planned
    # What FSDP2 allocates, padding and all, is the same on every rank.
    groups = [m._get_fsdp_state()._fsdp_param_group for m in (*model.blocks, model)]
    allocated = [p._sharded_param_data.numel() for group in groups for p in group.fsdp_params]
    assert sum(allocated) == planned


@pytest.mark.parametrize("optimizer", ["adamw_bf16", "adamw_8bit", "adamw"])
def test_states_are_the_optimizers(optimizer: str) -> None:
    """They are the bytes of the real optimizer's states, but for a step count each."""
    model = build(TINY_DIT).to_empty(device="cpu").bfloat16()
    shapes = [tuple(param.shape) for param in model.parameters()]
    if optimizer == "adamw":
        made: torch.optim.Optimizer = torch.optim.AdamW(model.float().parameters())
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        made.step()
    else:
        made = LowPrecisionAdamW(model.parameters(), eight_bit=optimizer == "adamw_8bit", seed=0)
    states = [value for state in made.state.values() for value in state.values()]
    assert sum(value.nbytes for value in states if value.ndim) == state_bytes(shapes, 1, optimizer)


@pytest.mark.parametrize(
    ("values", "world_size", "gigabytes"),
    [
        ({}, 8, 13.58),
        ({}, 2, 54.32),
        ({"optimizer": "adamw"}, 8, 27.16),
        ({"optimizer": "adamw_8bit"}, 8, 10.19),
        ({"ema_decay": 0.999}, 8, 13.58 + 6.79),
    ],
)
def test_persistent_memory_is_the_published_arithmetic(
    released: ModelSizes, values: dict[str, Any], world_size: int, gigabytes: float
) -> None:
    config = TrainConfig(**values)
    memory = predict_memory(config, released, check_world(config, world_size), LONG)
    names = ("parameters", "gradients", "optimizer states", "moving average")
    assert sum(memory.parts[name] for name in names) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_activations_by_hand(released: ModelSizes) -> None:
    config = TrainConfig()
    memory = predict_memory(config, released, check_world(config, 8), LONG)
    one = 37_440 * 4096 * 2
    assert memory.parts["block inputs"] == 48 * one
    assert memory.parts["kept attention outputs"] == 48 * (one + 37_440 * 32 * 4)
    values = 15.5 * 4096 + 3 * 11_008
    kept = 37_440 * values * 2 - one
    assert memory.parts["one block recomputed"] == pytest.approx(kept, rel=1e-6)
    assert memory.peak == sum(memory.parts.values())
    assert memory.peak == max(memory.phases.values()) == memory.phases[memory.phase]


@pytest.mark.parametrize(
    ("values", "name", "factor"),
    [
        ({"gradient_checkpointing_mode": "full"}, "kept attention outputs", 0),
        ({"train_batch_size": 2}, "block inputs", 2),
        ({"context_parallel_size": 2}, "block inputs", 1 / 2),
        ({"fsdp_replicate_size": 2}, "parameters", 2),
        ({"musubi_blocks_to_swap": 48}, "parameters", 38_687_808 / 13_581_071_424),
        ({"uncheckpointed_blocks": 12}, "block inputs", 3 / 4),
        ({"activation_offload_blocks": 40}, "block inputs", 10 / 48),
        ({"mixed_precision": "no", "optimizer": "adamw"}, "block inputs", 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_setting_does(
    released: ModelSizes, values: dict[str, Any], name: str, factor: float
) -> None:
    config, plain = TrainConfig(**values), TrainConfig()
    changed = predict_memory(config, released, check_world(config, 8), LONG)
    before = predict_memory(plain, released, check_world(plain, 8), LONG)
    wanted = factor * before.parts[name]
    assert changed.parts[name] == pytest.approx(wanted, rel=1e-6)


def test_accumulation_keeps_gradients_from_the_start(released: ModelSizes) -> None:
    one = TrainConfig(gradient_accumulation_steps=1)
    memory = predict_memory(one, released, check_world(one, 8), LONG)
    assert memory.parts["gradients"] == 0
    assert memory.phases["optimizer step"] / 1e9 == pytest.approx(13.58, rel=2e-3)


def test_swapped_blocks_are_in_host_memory(released: ModelSizes) -> None:
    config = TrainConfig(musubi_blocks_to_swap=4)
    memory = predict_memory(config, released, check_world(config, 8), LONG)
    assert memory.host["swapped blocks"] == 8 * 4 * 282_132_992 // 8
    assert memory.host["a checkpoint's copy"] / 1e9 == pytest.approx(81.5 / 8, rel=1e-3)


def test_host_memory_is_reported_and_checked(
    released: ModelSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(activation_offload_blocks=24, uncheckpointed_blocks=24)
    memory = predict_memory(config, released, check_world(config, 8), LONG)
    # The 24 that keep all, but for the model's last block, which is not copied.
    whole = 37_440 * (15.5 * 4096 + 3 * 11_008) * 2
    assert memory.host["offloaded activations"] == pytest.approx(1.2 * 23 * whole, rel=1e-6)
    needed = sum(memory.host.values())
    monkeypatch.setattr(dry_run, "host_memory", lambda: 8 * needed)
    assert dry_run.host_problems(memory, 8) == []
    monkeypatch.setattr(dry_run, "host_memory", lambda: 8 * needed - 1)
    (problem,) = dry_run.host_problems(memory, 8)
    assert "for 8 GPUs here" in problem
    assert "lower activation_offload_blocks" in problem


def test_host_memory_of_this_machine() -> None:
    assert 2**30 < dry_run.host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def samples_of(*buckets: Bucket, batch_size: int = 1, seed: int = 0) -> Samples:
    names = [str(index) for index in range(len(buckets))]
    order = TrainingOrder(names, buckets, batch_size=batch_size, seed=seed)
    return Samples(max(buckets, key=lambda bucket: bucket.num_tokens), order)


def test_time_of_the_source_documents_plan() -> None:
    """Section 5 of the research says 37.8 s a micro-batch on A100, 11.9 s on H200 at 50 %."""
    config = TrainConfig()
    world = check_world(config, 8)
    samples = samples_of(*[LONG] * 64)
    work = plan_time.step_work(config, RELEASED_CONFIG, samples, world)
    assert work.critical == pytest.approx(4 * 5.90e15, rel=1e-3)
    assert work.total == pytest.approx(32 * 5.90e15, rel=1e-3)
    assert work.lost == pytest.approx(0)
    text = plan_time.time_lines(config, work, samples, world, gpus=["A100", "H200"], depth=48)
    assert "A100     151.3 s a step" in text[-2]
    assert "52.5 days" in text[-2]
    assert "MFU 0.500 (assumed, not measured)" in text[-2]
    assert "H200      55.4 s a step" in text[-1]


RELEASED_CONFIG = dict(build(RELEASED).config)


def test_mixed_shapes_wait_for_the_longest() -> None:
    """The order gives the same, step by step."""
    buckets = [LONG] * 11 + [SHORT] * 14
    config = TrainConfig(gradient_accumulation_steps=2, image_to_video_probability=0.5)
    world = check_world(config, 4)
    samples = samples_of(*buckets)
    found, order = plan_time.step_work(config, RELEASED_CONFIG, samples, world), samples.order
    assert order is not None
    works = []
    for position in range(math.ceil(25 / 8) * 8):
        batch = order.micro_batch(position)
        cond = plan_time.draw_num_cond_latents(position, batch.bucket.latent_shape[1], config)
        works.append(plan_time.sample_flops(config, RELEASED_CONFIG, batch.bucket, cond))
    turns = [works[i : i + 4] for i in range(0, len(works), 4)]
    assert found.steps_seen == 4
    assert found.total == pytest.approx(sum(works) / 4)
    assert found.critical == pytest.approx(sum(map(max, turns)) / 4)
    assert 0 < found.lost < 0.5
    text = plan_time.time_lines(config, found, samples, world, gpus=["H200"], depth=48)
    assert any("is spent waiting" in line for line in text)


def test_context_parallel_shares_one_sample() -> None:
    config = TrainConfig(context_parallel_size=4)
    work = plan_time.step_work(
        config, RELEASED_CONFIG, samples_of(*[LONG] * 64), check_world(config, 8)
    )
    assert work.critical == pytest.approx(5.90e15, rel=1e-3)
    assert work.total == pytest.approx(8 * 5.90e15, rel=1e-3)
