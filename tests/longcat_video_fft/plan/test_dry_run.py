"""The whole dry run on a cache of real videos: what it says, and what it finds wrong."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.options.config_rules import check_world
from longcat_video_fft.options.load import read_configs
from longcat_video_fft.plan import dry_run as plan
from longcat_video_fft.plan.inputs import Report, Samples
from longcat_video_fft.plan.memory import GIB, ModelSizes, model_sizes
from longcat_video_fft.train import main
from tests.longcat_video_fft.support.plan_samples import add_dit, write_planned
from tests.longcat_video_fft.support.tiny import Tiny, make_model, precompute

if TYPE_CHECKING:
    from pathlib import Path


def dry_run(config: Path, *argv: str) -> int:
    return main(["--config", str(config), "--dry-run", *argv])


def test_a_sound_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_planned(tmp_path, tiny)
    assert dry_run(config) == 0
    before = capsys.readouterr().out
    assert "nothing there yet" in before
    assert "Assumed below: every sample is 9x32x48" in before
    assert precompute(config) == 0
    capsys.readouterr()
    files = sorted(tmp_path.rglob("*"))  # with those of the caches' manifests and locks
    assert dry_run(config, "--num_gpus", "4", "--gpu_memory_gib", "16") == 0
    assert sorted(tmp_path.rglob("*")) == files  # nothing was made
    text = capsys.readouterr().out
    for part in (
        "4 GPUs of 16.0 GiB (gpu_memory_gib); parameters cut over 4",
        "train_batch_size 1 x gradient_accumulation_steps 4 x 4 GPUs or groups of GPUs = 16",
        "12 samples: an epoch is 0.8 steps",
        "lr_warmup_steps=500 does not end within max_train_steps=20",
        "12 of 12 samples are there",
        "9x32x48        12 (100.0 %), 18 tokens each",
        "the caches are complete",
        "3 blocks of ",
        "predicted peak",
        "of 16.0: fits",
        "real order looked at",
        "Nothing was found that would stop the run.",
    ):
        assert part in text, part


@pytest.fixture(scope="module")
def released() -> ModelSizes:
    with torch.device("meta"):
        return model_sizes(LongCatVideoTransformer3DModel(text_tokens_zero_pad=True))


@pytest.fixture(scope="module")
def original(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    assert precompute(write_planned(folder, tiny)) == 0
    return folder


@pytest.fixture
def cached(original: Path, tmp_path: Path) -> Path:
    """Returns a config with a model and complete caches of its own."""
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    for path in (folder / "run").glob("*.json"):
        path.write_text(path.read_text().replace(str(original), str(folder)))
    return folder / "run" / "training_config.json"


def remove_dit(config: Path) -> None:
    shutil.rmtree(model_of(config) / "dit")


def model_of(config: Path) -> Path:
    return config.parent.parent / "model"


def another_vae(config: Path) -> None:
    model = model_of(config)
    shutil.rmtree(model / "vae")
    make_model(model.parent / "other", seed=1)
    shutil.copytree(model.parent / "other" / "vae", model / "vae")


def another_depth(config: Path) -> None:
    path = model_of(config) / "dit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": 4}))


def weights_of_another_width(config: Path) -> None:
    path = model_of(config) / "dit" / "config.json"
    text = path.read_text()
    shutil.rmtree(path.parent)
    add_dit(model_of(config), adaln_tembed_dim=48)
    path.write_text(text)


def no_weight_files(config: Path) -> None:
    for path in (model_of(config) / "dit").glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "argv", "parts"),
    [
        (remove_dit, (), ["has no dit/", "vae/, text_encoder/"]),
        (another_vae, (), ["made otherwise", "vae_sha256"]),
        (another_depth, (), ["weights are missing", "blocks.3."]),
        (weights_of_another_width, (), ["has shape", "48", "such weights"]),
        (no_weight_files, (), ["no *.safetensors file", '"random"']),
        (None, ("--gpu_memory_gib", "0.5"), ["0.8 GiB a GPU are needed and there are 0.5"]),
        (None, ("--num_gpus", "3", "--context_parallel_size", "2"),
         ["context_parallel_size=2 does not divide the 3 devices"]),
        (None, ("--num_gpus", "3", "--context_parallel_size", "3"),
         ["context_parallel_size=3 does not divide the model's 4 heads"]),
        (None, ("--fsdp_enable", "false"), ["fsdp_enable=false with 8 devices"]),
        (None, ("--num_held_out_samples", "12"), ["leaves nothing to train on"]),
        (None, ("--resume_from_checkpoint", "gone/checkpoint-5"), ["gone/checkpoint-5"]),
        (None, ("--pretrained_model_name_or_path", "./gone"), ["./gone: no such folder"]),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "".join(value or "")[:40],
)  # fmt: skip
def test_what_would_stop_the_run(
    cached: Path, capsys: pytest.CaptureFixture[str], harm: Any, argv: tuple[str, ...],
    parts: list[str],
) -> None:  # fmt: skip
    if harm is not None:
        harm(cached)
    assert dry_run(cached, "--num_gpus", "8", *argv) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("STOPS THE RUN: ")
    for part in parts:
        assert part in last


def test_random_weights_need_no_files(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_weight_files(cached)
    assert dry_run(cached, "--transformer_init", "random") == 0
    assert "Nothing was found" in capsys.readouterr().out


def test_a_full_disk(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cached)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert dry_run(cached) == 1
    assert "are free. Lower checkpoints_total_limit" in capsys.readouterr().out


def test_what_a_cache_lacks(cached: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The real mix is that of the survey; the training makes the rest first."""
    indexes = sorted((cached.parent / "vae").glob("*.index"))
    lines = indexes[0].read_text().splitlines(keepends=True)
    indexes[0].write_text("".join(lines[:-2]))
    assert dry_run(cached) == 0
    text = capsys.readouterr().out
    assert "10 of 12 samples are there" in text
    assert "missing: 2 videos and 0 captions" in text
    assert "9x32x48        12 (100.0 %)" in text


def test_the_released_model_before_its_download(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = write_planned(tmp_path, tiny, checkpoints_total_limit=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**13))
    argv = ("--pretrained_model_name_or_path", "null", "--num_gpus", "8")
    assert dry_run(config, *argv) == 0
    text = capsys.readouterr().out
    assert "meituan-longcat/LongCat-Video: not on this machine" in text
    assert "13,581,071,424 parameters" in text
    assert "35,266,624 a GPU each" in text
    assert "Not checked: the weights" in text


def test_lines_are_what_is_printed(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, data = read_configs(["--config", str(cached)])
    report = Report()
    plan.write_plan(config, data, 2, report)
    assert not report.problems
    assert not report.unchecked
    assert plan.dry_run(config, data, 2) == 0
    assert capsys.readouterr().out.startswith("\n".join(report.lines))


def test_placeholders_of_the_data_file(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is priced, what was not looked at is reported, and no other command takes them."""
    config = write_planned(tmp_path, tiny)
    path = config.parent / "databackend.json"
    raw = json.loads(path.read_text())
    raw[0] |= {"type": "aws", "instance_data_dir": "", "aws_bucket_name": "YOUR_BUCKET_NAME"}
    path.write_text(json.dumps(raw))
    assert dry_run(config, "--num_gpus", "2") == 0
    text = capsys.readouterr().out
    for part in ("predicted peak", "Disk: ", "s a step", "Other settings that fit"):
        assert part in text, part
    (line,) = (line for line in text.splitlines() if line.startswith("Not checked: "))
    assert "databackend.json, where aws_bucket_name is still a placeholder" in line
    assert "the videos" in line
    assert dry_run(config, "--num_gpus", "2", "--gpu_memory_gib", "0.5") == 1
    assert main(["--config", str(config)]) == 2
    assert precompute(config, "--dry_run") == 2
    assert precompute(config) == 2
    assert "aws_bucket_name still holds the placeholder" in capsys.readouterr().err


def alternatives(released: ModelSizes, gpus: int, gib: float) -> dict[str, tuple[float, float]]:
    """Returns (GiB, samples a second) of the settings that are named, in their order."""
    config = TrainConfig(data_backend_config="databackend.json")
    world, samples = check_world(config, gpus), Samples(Bucket(93, 480, 832), None)
    machine = plan.Machine(gpus, 0, gib * GIB, ["H200"], "")
    rows = plan.alternative_lines(config, released, world, samples, machine)
    fields = [row.split() for row in rows if row != "none"]
    return {" ".join(row[:-3]): (float(row[-3]), float(row[-1])) for row in fields}


def test_alternatives_fit_and_use_what_is_left(released: ModelSizes) -> None:
    """The fastest comes first; on a larger machine more blocks keep their activations."""
    most: list[list[str]] = []
    for gib in (45, 79.2, 139.8):
        found = alternatives(released, 8, gib)
        assert all(needed <= gib for needed, _ in found.values())
        speeds = [speed for _, speed in found.values()]
        assert speeds == sorted(speeds, reverse=True)
        assert "--activation_offload_blocks 48" in found  # smaller ones are reported too
        most.append([name for name in found if name.startswith("--uncheckpointed_blocks")])
    assert most == [[], ["--uncheckpointed_blocks 5"], ["--uncheckpointed_blocks 14"]]
    assert "--fp8_linears true" in found
    assert alternatives(released, 1, 24) == {}
