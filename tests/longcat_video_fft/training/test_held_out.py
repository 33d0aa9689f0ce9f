"""Held-out samples: which they are, and their loss at fixed timesteps, on any devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longcat_video_fft.dataset.captions import EMPTY_CAPTION, caption_id
from longcat_video_fft.dataset.latents import LatentDataset
from longcat_video_fft.dataset.sampler import split_held_out
from longcat_video_fft.dataset.samples import SAMPLES
from longcat_video_fft.model.flow_matching import make_generator
from longcat_video_fft.model.loading import load_weights
from longcat_video_fft.model.sharding import local
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.training.held_out import TIMESTEPS, held_out_loss
from longcat_video_fft.training.parallel import Engine
from tests.longcat_video_fft.dataset.test_dataset import configure, write_shards
from tests.longcat_video_fft.support.spawn import join_alone, spawn

if TYPE_CHECKING:
    from longcat_video_fft.options.data_config import DataConfig

LONG, SHORT = Bucket(9, 32, 48), Bucket(5, 48, 32)
NAMES = [f"part{n % 3}/{n:02d}.mp4" for n in range(13)]
BUCKETS = {name: SHORT if n % 3 == 0 else LONG for n, name in enumerate(NAMES)}
WIDTH, TOKENS = 24, 16
TINY: dict[str, Any] = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": WIDTH,
    "adaln_tembed_dim": 16, "text_tokens_zero_pad": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Makes 13 samples, each with a caption of its own."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("caches")
    latents = [
        (name, torch.randn(bucket.latent_shape).bfloat16(), str(bucket), 1000)
        for name, bucket in BUCKETS.items()
    ]
    captions = {name: caption_id(f"caption of {name}") for name in NAMES}
    lengths = {caption: 3 + n for n, caption in enumerate(captions.values())} | {EMPTY_CAPTION: 1}
    embeds = [(c, torch.randn(n, WIDTH).bfloat16(), "", 0) for c, n in lengths.items()]
    write_shards(folder / "vae", latents)
    write_shards(folder / "text", embeds)
    table = {
        "filename": NAMES,
        "size": [1000] * len(NAMES),
        "bucket": [str(bucket) for bucket in BUCKETS.values()],
        "caption_id": list(captions.values()),
    }
    pq.write_table(pa.table(table), folder / "vae" / SAMPLES)
    return configure(folder, folder / "vae", folder / "text")


def open_dataset(data: DataConfig, num_held_out: int, *, seed: int = 42) -> LatentDataset:
    return LatentDataset(
        data, batch_size=2, seed=seed, max_tokens=TOKENS, num_held_out=num_held_out
    )


def build_engine(**options: Any) -> Engine:
    config = TrainConfig(optimizer="adamw", mixed_precision="no", **options)
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(**TINY)
    return Engine(
        model,
        config,
        torch.device("cpu"),
        load_weights=lambda m: load_weights(m, None, seed=3, init="random"),
    )


def named(names: list[str], num: int) -> set[str]:
    return {name for name, out in zip(names, split_held_out(names, num), strict=True) if out}


def test_the_split_is_by_name() -> None:
    names = [f"{n}.mp4" for n in range(1000)]
    chosen = named(names, 100)
    assert len(chosen) == 100
    assert named(names[::-1], 100) == chosen
    assert named(names, 50) < chosen
    assert named(names, 0) == set()
    numbers = torch.tensor([float(name.removesuffix(".mp4")) for name in chosen])
    assert abs(numbers.mean() - 499.5) < 4 * 288.7 / 10, "not spread over the set"


def test_what_was_trained_on_never_is_held_out_when_samples_are_added() -> None:
    names = [f"{n}.mp4" for n in range(1000)]
    before, after = named(names[:700], 100), named(names, 100)
    assert not (after - before) & set(names[:700])
    assert len(before & after) > 50


@pytest.mark.parametrize("num", [3, 4])
def test_a_sample_is_left_to_train_on(num: int) -> None:
    with pytest.raises(ValueError, match=rf"num_held_out_samples={num} .* only 3 samples"):
        split_held_out(["a", "b", "c"], num)
    assert sum(split_held_out(["a", "b", "c"], 2)) == 2


def test_the_data_set_keeps_them_from_training(data: DataConfig) -> None:
    dataset = open_dataset(data, 4)
    held_out = [dataset.held_out_sample(index) for index in range(len(dataset.held_out))]
    names = [name for batch in held_out for name in batch.names]
    assert set(names) == named(NAMES, 4)
    assert {e[0].id for e in open_dataset(data, 4, seed=1).held_out} == set(names)
    trained = [n for p in range(2 * dataset.order.epoch_length) for n in dataset[p].names]
    assert sorted(trained) == sorted(2 * [name for name in NAMES if name not in names])
    assert [batch.bucket for batch in held_out] == sorted(BUCKETS[name] for name in names)
    whole = open_dataset(data, 0)
    assert whole.held_out == []
    for batch in held_out:
        (name,) = batch.names
        position, row = next(
            (p, whole[p].names.index(name))
            for p in range(whole.order.epoch_length)
            if name in whole[p].names
        )
        for field in ("latents", "caption_embeds", "caption_mask"):
            assert torch.equal(getattr(batch, field)[0], getattr(whole[position], field)[row])
        assert batch.caption_mask.sum() == 3 + NAMES.index(name), "its own caption"
    with pytest.raises(ValueError, match=r"num_held_out_samples=13 .* only 13 samples"):
        open_dataset(data, 13)


def test_the_loss_is_that_of_the_formula(data: DataConfig) -> None:
    join_alone()
    dataset, engine = open_dataset(data, 3), build_engine()
    found = held_out_loss(engine, dataset, engine.config)
    assert list(found) == ["eval/loss", *(f"eval/loss_t{t}" for t in TIMESTEPS)]
    expected: dict[str, float] = {}
    for time in TIMESTEPS:
        losses = []
        for index in range(3):
            batch = dataset.held_out_sample(index)
            clean = batch.latents.float()
            noise = torch.randn(
                clean.shape[1:], generator=make_generator(42, "held out", batch.names[0], time)
            )
            prediction = engine.module(
                (1 - time / 1000) * clean + time / 1000 * noise,
                torch.tensor([float(time)]),
                batch.caption_embeds[:, None],
                batch.caption_mask,
            )
            losses.append((prediction - (clean - noise)).square().mean().item())
        expected[f"eval/loss_t{time}"] = sum(losses) / 3
    expected["eval/loss"] = sum(expected.values()) / len(TIMESTEPS)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found.values())) == len(found)


def test_without_held_out_samples(data: DataConfig) -> None:
    join_alone()
    engine = build_engine()
    assert held_out_loss(engine, open_dataset(data, 0), engine.config) == {}


def test_it_changes_nothing_but_with_the_weights(data: DataConfig) -> None:
    """Asked again it gives the same; the training continues as if it had not been asked."""
    join_alone()
    dataset, plain, asked = open_dataset(data, 3), build_engine(), build_engine()
    before = held_out_loss(asked, dataset, asked.config)
    assert all(p.grad is None for p in asked.module.parameters())
    assert held_out_loss(asked, dataset, asked.config) == before
    take_step(plain)
    take_step(asked)
    for one, other in zip(plain.module.parameters(), asked.module.parameters(), strict=True):
        assert torch.equal(local(one), local(other))
    after = held_out_loss(asked, dataset, asked.config)
    assert all(after[name] != before[name] for name in before)
    assert held_out_loss(plain, dataset, plain.config) == after


def take_step(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = torch.randn(1, 1, TOKENS, WIDTH, generator=generator)
    engine.backward(engine.module(latents, torch.tensor([500.0]), text).square().mean())
    engine.clip()
    engine.step()


def test_two_processes_say_the_same(data: DataConfig) -> None:
    """They make 5 and 15 forwards: one process has a repeat, which does not count."""
    join_alone()
    engine = build_engine()
    expected = {
        num: held_out_loss(engine, open_dataset(data, num), engine.config) for num in (1, 3)
    }
    spawn(check_same, data, expected)


def check_same(data: DataConfig, expected: dict[int, dict[str, float]]) -> None:
    sharded, together = build_engine(), build_engine(context_parallel_size=2)
    for num, losses in expected.items():
        dataset = open_dataset(data, num)
        assert held_out_loss(sharded, dataset, sharded.config) == losses
        # These share each sample's tokens; what both find is the loss of one sample, not of two.
        found = held_out_loss(together, dataset, together.config)
        assert found == pytest.approx(losses, rel=1e-4)
