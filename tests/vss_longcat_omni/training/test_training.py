"""train_ds.py on made samples and a tiny model: one process, and two by the real launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.vss_longcat_omni.support.tiny import make_example
from vss_longcat_omni import train_ds
from vss_longcat_omni.dataset.collator import collate, count_targets
from vss_longcat_omni.inference.answerer import load_answerer
from vss_longcat_omni.model import build
from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
from vss_longcat_omni.model.loss import LossSums, combine
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.run_arguments import LossWeights
from vss_longcat_omni.training import trainer
from vss_longcat_omni.training.checkpoint import find_checkpoint
from vss_longcat_omni.training.trainer import OmniTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vss_longcat_omni.conftest import Ground

FOLDER = Path(train_ds.__file__).parent
ALONE = {"deepspeed": "", "bf16": False}


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard_logs"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def losses(out: Path, step: int) -> list[float]:
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def test_six_steps_equal_three_and_three_resumed(ground: Ground, tmp_path: Path) -> None:
    """Bitwise: order, dropout, optimizer and schedule continue where they stopped."""
    train_ds.main(ground.argv(tmp_path / "whole", **ALONE))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    resumed = {"resume_from_checkpoint": "latest"}
    train_ds.main(ground.argv(tmp_path / "part", **ALONE, **resumed))
    assert_same(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    found = losses(tmp_path / "part", 6)
    assert found == losses(tmp_path / "whole", 6)
    assert len(found) == 6
    assert found[-1] < found[0]


def test_micro_batch_1_times_8_equals_8_times_1(ground: Ground, tmp_path: Path) -> None:
    """Each term is divided by the step's own count, so a step has one loss however divided."""
    options = ALONE | {"packing": False, "max_steps": 1, "lora_dropout": 0.0, "save_steps": 1}
    options["warmup_steps"] = 0
    for size, accumulation in ((1, 12), (12, 1)):
        out = tmp_path / str(size)
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        train_ds.main(ground.argv(out, **options | split))
    one, twelve = losses(tmp_path / "1", 1), losses(tmp_path / "12", 1)
    assert one == pytest.approx(twelve, rel=1e-5)
    found, wanted = weights(tmp_path / "1"), weights(tmp_path / "12")
    moved = [name for name in found if ".lora_B" in name]
    for name in moved:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)
    assert any(found[name].any() for name in moved)


def test_a_term_is_divided_once_by_the_targets_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two processes, whose gradients are averaged: so by half of them, be that below 1."""
    monkeypatch.setattr(trainer, "sum_over_processes", lambda counts: counts + torch.ones(3))
    batches = [collate([make_example(seed, num_text=3, num_frames=9)]) for seed in range(2)]
    own = torch.stack([count_targets(batch) for batch in batches]).sum(dim=0)
    ours: Any = SimpleNamespace(args=SimpleNamespace(world_size=2))
    found, divisors = OmniTrainer.get_batch_samples(ours, iter(batches), 2, torch.device("cpu"))
    assert found == batches
    assert torch.equal(divisors, (own + 1) / 2)
    assert OmniTrainer.loss_is_scaled_for_ga
    sums = LossSums(torch.tensor([3.0, 0.0, 0.0]), *[torch.zeros(3)] * 2)
    weights = LossWeights(text=1.0)
    assert combine(sums, torch.tensor([0.5, 0.0, 0.0]), weights).item() == 6.0


def test_a_model_trained_whole_learns_its_samples_and_answers(
    ground: Ground, tmp_path: Path
) -> None:
    options = ALONE | {"tuning": "full", "learning_rate": 3e-3, "max_steps": 40, "save_steps": 40}
    options |= {"gradient_accumulation_steps": 1, "max_tokens": 2000, "eval_strategy": "epoch"}
    train_ds.main(ground.argv(tmp_path / "out", **options))
    found = losses(tmp_path / "out", 40)
    assert found[-1] < 0.4 * found[0]
    state = json.loads((tmp_path / "out" / "checkpoint-40" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert {"eval_text_loss", "eval_audio_loss", "eval_text_accuracy"} <= set(logged[-1])
    codec = ground.cache / "codec"
    answerer = load_answerer(str(tmp_path / "out"), codec_folder=codec, max_frames=40)
    sample = ground.data / "training" / "01"
    answer = answerer.answer(sample / "input.mp4", sample / "input.wav")
    assert answer.text.startswith("it ")  # as all answers do
    assert len(answerer.codec.decode(answer.codes)) > 0


def test_projectors_and_heads_are_trained_by_option(ground: Ground, tmp_path: Path) -> None:
    options = ALONE | {"max_steps": 2, "train_projectors": True, "train_audio_heads": True}
    train_ds.main(ground.argv(tmp_path / "out", **options))
    beside = load_file(tmp_path / "out" / "trained_modules.safetensors")
    kinds = {name.partition(".")[0] for name in beside}
    assert kinds == {"vision_projector", "audio_projector", "audio_embedding", "speech_heads"}
    stored = CheckpointReader(ground.model)
    name = "speech_heads.audio_output_layers.0.weight"
    pieces = stored.find(name, tuple(beside[name].shape))
    assert pieces is not None
    assert not torch.equal(pieces[0].read(0, beside[name].numel()), beside[name].flatten())
    assert all(".lora_" in key for key in weights(tmp_path / "out"))


def test_a_loss_that_is_no_number_stops_the_run(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = build.build_model

    def spoil(*arguments: Any) -> Any:
        model = spoiled(*arguments)
        dict(model.named_parameters())["base_model.model.lm_head.weight"].data[0] = float("nan")
        return model

    monkeypatch.setattr(build, "build_model", spoil)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is not a finite number"):
        train_ds.main(ground.argv(tmp_path / "out", **ALONE))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_signal_saves_after_the_step_and_stops(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Send(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **_: Any) -> None:
            if arguments[1].global_step == 1:  # the second step
                os.kill(os.getpid(), signal.SIGUSR1)

    class Watched(OmniTrainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, callbacks=[Send()], **options)

    monkeypatch.setattr(trainer, "OmniTrainer", Watched)
    train_ds.main(ground.argv(tmp_path / "out", **ALONE))
    assert find_checkpoint(tmp_path / "out", "latest").name == "checkpoint-2"
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # it is not done


def test_the_adapter_is_uploaded_once_where_that_is_asked(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def __init__(self) -> None:
            self.uploads: list[dict[str, Any]] = []

        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, **options: Any) -> None:
            folder = Path(options["folder_path"])
            names = {path.name for path in folder.iterdir()}
            self.uploads.append(options | {"names": names})

    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    for name, value in {"PUSH_TO_HUB": "true", "HF_USER": "me", "HF_TOKEN": "hf_secret"}.items():
        monkeypatch.setenv(name, value)
    train_ds.main(ground.argv(tmp_path / "out", **ALONE, max_steps=2, save_steps=1))
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/out"
    assert "checkpoint-*" in upload["ignore_patterns"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= upload["names"]
    for path in (tmp_path / "out").glob("*"):  # the secret is nowhere in what is uploaded
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_half_written_checkpoints_are_not_picked(tmp_path: Path) -> None:
    for step in (3, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (3, 9):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-9"
    with pytest.raises(ValueError, match=r"checkpoint-12 is no whole checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-12"))
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path / "checkpoint-3", "latest")


def launch(argv: list[str], script: Path = Path("train_ds.py")) -> str:
    """The documented command, in the folder, on two CPU processes; returns what it printed."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    with socket.socket() as holder:  # no other program is given its port; torch may listen on it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        command += ["--master_port", str(holder.getsockname()[1]), str(script), *argv]
        done = subprocess.run(
            command,
            cwd=FOLDER,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=700,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


# Both, sound alone, pictures alone, neither, in turn: the two processes seldom have the same.
MIXED = """
from vss_longcat_omni import train_ds
from vss_longcat_omni.dataset.conversation import MediaItem, TextItem, Turn

plain = train_ds.preprocess_function

def preprocess_function(folder, media, transcript, codes, **options):
    turns = plain(folder, media, transcript, codes, **options)
    shown = tuple(p for p in media.parts if p.kind in ("timestamp", "image_tokens"))
    sound = tuple(p for p in media.parts if p.kind.startswith("audio"))
    items = [media, MediaItem(sound), MediaItem(shown), TextItem("what is it")]
    return [Turn("user", (items[int(folder.name) % 4],)), turns[-1]]

train_ds.preprocess_function = preprocess_function
train_ds.main()
"""


@pytest.mark.dist
@pytest.mark.timeout(1500)  # two launches, on a busy machine
def test_two_processes_under_zero_3_with_offload(ground: Ground, tmp_path: Path) -> None:
    """Nothing hangs, the loss falls, resuming is exact, and PEFT loads what was gathered."""
    script = tmp_path / "mixed.py"
    script.write_text(MIXED)
    out = tmp_path / "whole"
    config = FOLDER / "ds_config.json"
    options = {"packing": False, "deepspeed": config, "max_steps": 4, "save_steps": 2}
    log = launch(ground.argv(out, **options), script)
    assert "19,072 parameters are trained" in log
    found = losses(out, 4)
    assert found[-1] < found[0]
    shutil.copytree(out / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    options["resume_from_checkpoint"] = "latest"
    launch(ground.argv(tmp_path / "part", **options), script)
    assert_same(weights(tmp_path / "part"), weights(out))
    assert losses(tmp_path / "part", 4) == found
    adapter = weights(out)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    assert any(tensor.any() for name, tensor in adapter.items() if ".lora_B" in name)
    model = LongcatOmniForCausalLM(load_config(ground.model))
    load_weights(model, CheckpointReader(ground.model), show_progress=False)
    loaded = PeftModel.from_pretrained(model, str(out))  # pyright: ignore[reportArgumentType]
    names = {n.replace(".default", "") for n, _ in loaded.named_parameters() if ".lora_" in n}
    assert names == set(adapter)


@pytest.mark.dist
@pytest.mark.long
def test_the_documented_command(ground: Ground, tmp_path: Path) -> None:
    """In the folder, with its own ds_config.json."""
    launch(ground.argv(tmp_path / "out", max_steps=2, save_steps=2))
    assert len(losses(tmp_path / "out", 2)) == 2
