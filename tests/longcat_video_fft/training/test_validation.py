"""Validation videos: shared out over processes, the same on any number, by the weights they say."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longcat_video_fft.dataset.latents import LatentDataset
from longcat_video_fft.media.video_file import read_frames, write_mp4
from longcat_video_fft.model.loading import load_weights
from longcat_video_fft.model.sharding import local
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.options.load import read_configs
from longcat_video_fft.training import validation
from longcat_video_fft.training.distributed import is_main_process
from longcat_video_fft.training.parallel import Engine
from longcat_video_fft.training.validation import EMBEDDINGS, Validation, read_prompts
from longcat_video_fft.training.video_log import open_tracker
from tests.longcat_video_fft.support.spawn import join_alone, spawn
from tests.longcat_video_fft.support.tiny import Tiny, precompute, write_configs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

TOKENS = 96
PROMPTS = ["a red ball rolls", "a blue square", "a green triangle &amp; a dog"]
OPTIONS: dict[str, Any] = {
    "validation_prompt": "prompts.txt", "validation_resolution": "32x48",
    "validation_num_video_frames": 5, "validation_num_inference_steps": 2,
    "validation_negative_prompt": "blurred", "num_validation_images": 1, "vae_dtype": "fp32",
    "max_text_tokens": TOKENS, "num_held_out_samples": 2, "optimizer": "adamw",
    "mixed_precision": "no", "gradient_checkpointing": False,
}  # fmt: skip


lossless = functools.partial(write_mp4, crf=0)  # compression makes much of a little difference


@pytest.fixture(scope="module", autouse=True)
def _lossless() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "write_mp4", lossless)
        yield


@pytest.fixture(scope="module")
def config_path(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the config of a run whose caches are there."""
    folder = tmp_path_factory.mktemp("run")
    path = write_configs(folder, tiny, logging_dir=str(folder / "logs"), **OPTIONS)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "", PROMPTS[2]]) + "\n")
    assert precompute(path) == 0
    return path


def open_run(config_path: Path, **options: Any) -> tuple[TrainConfig, LatentDataset]:
    config, data = read_configs(["--config", str(config_path)])
    for name, value in options.items():
        setattr(config, name, value)
    held_out = config.num_held_out_samples
    dataset = LatentDataset(
        data, batch_size=1, seed=1, max_tokens=config.max_text_tokens, num_held_out=held_out
    )
    return config, dataset


def build_engine(config: TrainConfig) -> Engine:
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(
            hidden_size=96, depth=2, num_heads=2, caption_channels=32, adaln_tembed_dim=32,
            text_tokens_zero_pad=True,
        )  # fmt: skip
    return Engine(
        model,
        config,
        torch.device("cpu"),
        load_weights=lambda m: load_weights(m, None, seed=3, init="random"),
    )


def validate(config_path: Path, out: Path, **options: Any) -> dict[str, float]:
    """Runs one validation of a new engine; rank 0 writes its metrics to OUT/metrics.json."""
    join_alone()
    config, dataset = open_run(config_path, **options)
    run = Validation(config, dataset, out)
    engine = build_engine(config)
    before = weights(engine)
    tracker = open_tracker(config, out)
    engine.module.train()
    metrics = run.run(engine, 7, tracker)
    tracker.close()
    assert engine.module.training
    for name, value in weights(engine).items():
        assert torch.equal(value, before[name]), f"{name} has changed"
    # The sharded module continues to train.
    batch = dataset[0]
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    prediction = engine.module(
        noise, torch.full((1,), 500.0), batch.caption_embeds[:, None], batch.caption_mask
    )
    engine.backward(prediction.square().mean())
    assert engine.clip() > 0
    if is_main_process():
        (out / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def weights(engine: Engine) -> dict[str, Tensor]:
    return {n: local(p).detach().clone() for n, p in engine.module.named_parameters()}


def validate_in_group(config_path: str, out: str, context: int) -> None:
    validation.write_mp4 = lossless
    validate(Path(config_path), Path(out), context_parallel_size=context)


def videos(out: Path) -> list[np.ndarray]:
    paths = sorted((out / "validation" / "step-7").iterdir())
    assert [path.name for path in paths] == [f"{n}.mp4" for n in range(len(paths))]
    return [read_frames(path, (32, 48)).astype(int) for path in paths]


@pytest.fixture(scope="module")
def alone(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    validate(config_path, out)
    return out


def test_a_video_a_prompt_with_metrics_and_pictures(config_path: Path, alone: Path) -> None:
    made = videos(alone)
    assert [video.shape for video in made] == [(5, 32, 48, 3)] * 3
    assert all(video.std() > 1 for video in made)
    assert np.abs(made[0] - made[1]).max() > 0, "another prompt"
    metrics = json.loads((alone / "metrics.json").read_text())
    assert metrics["validation/failed_videos"] == 0
    assert metrics["validation/seconds"] > 0
    assert metrics["eval/loss"] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(config_path.parent / "logs"))
    logged.Reload()
    assert logged.Tags()["images"] == [f"validation/{number}" for number in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize("context", [1, 2])
def test_two_processes_make_the_videos_of_one(
    config_path: Path, alone: Path, tmp_path: Path, context: int
) -> None:
    """2 devices share 3 videos: one repeats; with context parallelism both work on each."""
    spawn(validate_in_group, str(config_path), str(tmp_path), context)
    for one, two in zip(videos(alone), videos(tmp_path), strict=True):
        difference = np.abs(one - two)
        assert difference.mean() < 0.1
        assert difference.max() <= 4
    there, here = (json.loads((p / "metrics.json").read_text()) for p in (alone, tmp_path))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-4)


def test_seeds_make_other_videos_of_a_prompt(config_path: Path, tmp_path: Path) -> None:
    options = {"validation_prompt": "a cat", "num_validation_images": 2, "num_held_out_samples": 0}
    metrics = validate(config_path, tmp_path, **options)
    first, second = videos(tmp_path)
    assert np.abs(first - second).mean() > 1
    assert not any(key.startswith("eval/") for key in metrics)


def test_averaged_weights_make_the_videos(config_path: Path, alone: Path, tmp_path: Path) -> None:
    join_alone()
    config, dataset = open_run(config_path, ema_decay=0.9)
    run, engine = Validation(config, dataset, tmp_path), build_engine(config)
    assert engine.ema is not None
    with torch.no_grad():  # the weights are lost, their averages are those of `alone`
        for param in engine.module.parameters():
            local(param).zero_()
    run.run(engine, 7, open_tracker(config, tmp_path))
    for average, own in zip(videos(tmp_path), videos(alone), strict=True):
        assert np.abs(average - own).max() <= 2
    assert all(local(p).abs().max() == 0 for p in engine.module.parameters())


def test_without_prompts_only_the_held_out_loss(config_path: Path, tmp_path: Path) -> None:
    metrics = validate(config_path, tmp_path, validation_prompt=None)
    assert "eval/loss" in metrics
    assert "validation/seconds" not in metrics
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json"}


def test_a_video_that_cannot_be_written_does_not_end_the_run(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = validation.write_mp4

    def fill_disk(path: Path, frames: np.ndarray) -> None:
        if path.name == "1.mp4":
            raise OSError(28, "No space left on device")
        write(path, frames)

    monkeypatch.setattr(validation, "write_mp4", fill_disk)
    assert validate(config_path, tmp_path)["validation/failed_videos"] == 1
    made = sorted(path.name for path in (tmp_path / "validation" / "step-7").iterdir())
    assert made == ["0.mp4", "2.mp4"]


def test_embeddings_are_those_of_the_pipeline_and_made_once(
    config_path: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_alone()
    from transformers import AutoTokenizer, UMT5EncoderModel

    config, dataset = open_run(config_path)
    first = Validation(config, dataset, tmp_path)
    encoder = UMT5EncoderModel.from_pretrained(tiny.model / "text_encoder", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model / "tokenizer")
    text = "a green triangle & a dog"
    tokens = tokenizer(
        text, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    expected = encoder.eval()(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
    length = int(tokens.attention_mask.sum())
    assert len(first.embeddings[text]) == length == len(text) + 1
    torch.testing.assert_close(first.embeddings[text], expected[:length], atol=0.03, rtol=0.03)
    with monkeypatch.context() as patch:  # a resumed run has no need of the text encoder
        patch.setattr(validation, "TextEncoder", None)
        again = Validation(config, dataset, tmp_path)
        assert torch.equal(again.embeddings[text], first.embeddings[text])
        config.validation_negative_prompt = "another"
        with pytest.raises(TypeError):
            Validation(config, dataset, tmp_path)
    assert "another" in Validation(config, dataset, tmp_path).embeddings
    assert {path.name for path in tmp_path.iterdir()} == {EMBEDDINGS}


def test_a_prompt_that_the_model_cannot_take_is_an_error(config_path: Path, tmp_path: Path) -> None:
    join_alone()
    config, dataset = open_run(config_path, validation_prompt="word " * 40)
    with pytest.raises(ValueError, match=r"of 200 tokens .* max_text_tokens=96"):
        Validation(config, dataset, tmp_path)


def test_prompts_are_a_text_or_a_file(tmp_path: Path) -> None:
    source = tmp_path / "training_config.json"
    source.write_text("{}")
    config = TrainConfig(source=str(source))
    assert read_prompts(config) == []
    config.validation_prompt = "a cat | a dog"
    assert read_prompts(config) == ["a cat | a dog"]
    config.validation_prompt = "prompts.txt"
    with pytest.raises(ValueError, match=r"validation_prompt=prompts\.txt: no such file"):
        read_prompts(config)
    (tmp_path / "prompts.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(config)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(config) == ["a cat", "a dog"]


def test_a_half_written_video_has_another_name(tmp_path: Path) -> None:
    gray = np.zeros((2, 32, 48), np.uint8)
    with pytest.raises(ValueError, match="ndim"):
        validation.write_mp4(tmp_path / "0.mp4", gray)
    assert not (tmp_path / "0.mp4").exists()


@pytest.fixture(scope="module", autouse=True)
def leave_group() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
