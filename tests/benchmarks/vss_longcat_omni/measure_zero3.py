"""LoRA steps under ZeRO-3 at the released widths with few layers and random weights, on the GPUs
at hand, beside what `plan` predicts. Through the model, the trainer and the options of train_ds.py.

    deepspeed --num_gpus=2 --module tests.benchmarks.vss_longcat_omni.measure_zero3 \
        --layers 3 [--samples 4] [--profile table.txt] [--option value ...]

Weights stay on the GPUs (no offload_param). Prints a line a step and one of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

import vss_longcat_omni
from tests.vss_longcat_omni.support.tiny import make_example, tiny_config
from vss_longcat_omni.dataset.special_tokens import SpecialTokens
from vss_longcat_omni.model.build import build_model
from vss_longcat_omni.model.loading import RELEASED, find_config
from vss_longcat_omni.options.training_arguments import parse_arguments
from vss_longcat_omni.plan.__main__ import check_fits
from vss_longcat_omni.plan.memory import predict_memory
from vss_longcat_omni.plan.verdict import speed
from vss_longcat_omni.training.trainer import OmniTrainer

DS_CONFIG = Path(vss_longcat_omni.__file__).with_name("ds_config.json")
STARTED = time.monotonic()
EXTRA = 3  # positions of `make_example` beside the frames, without media


class Samples(torch.utils.data.Dataset):
    """Answers of so many positions, spoken for most of them, without media."""

    def __init__(self, length: int, count: int) -> None:
        frames = length - EXTRA
        self.lengths = [length] * count
        self.examples = [
            make_example(seed, num_text=frames // 4, num_frames=frames, has_media=False)
            for seed in range(count)
        ]
        found = {len(example.input_ids) for example in self.examples}
        assert found == {length}, found

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class Watch(TrainerCallback):
    """Keeps what is logged; the memory of the first step, which builds the states, is left out."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args: Any, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.steps.append(dict(logs))
            say(args, json.dumps(logs))


class Profile(TrainerCallback):
    """A table of the kernels of the last step, on the first process."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == state.max_steps:
            self.profiler.stop()
            averages = self.profiler.key_averages()
            table = averages.table(sort_by="cuda_time_total", row_limit=40)
            self.path.write_text(table, encoding="utf-8")


def say(training: Any, text: str) -> None:
    """With the seconds so far: a run that is stopped has shown what it did."""
    if training.should_log:
        sys.stdout.write(f"{time.monotonic() - STARTED:.0f} s: {text}\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="in a micro-batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", default=None, help="write a table of kernels here")
    parser.add_argument("--tiny", action="store_true", help="tiny widths, to try it on a CPU")
    options, rest = parser.parse_known_args([w for w in sys.argv[1:] if "local_rank" not in w])
    settings = json.loads(DS_CONFIG.read_text())
    settings["zero_optimization"].pop("offload_param")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(settings))
        argv = ["--deepspeed", str(path), "--max_steps", str(options.steps), "--report_to", "none"]
        argv += ["--output_dir", f"{folder}/out", "--save_strategy", "no"]
        run, training = parse_arguments([*argv, *rest])
        measure(options, run, training)


def measure(options: argparse.Namespace, run: Any, training: Any) -> None:
    config = tiny_config() if options.tiny else find_config(RELEASED)
    assert config is not None
    config.num_layers = options.layers
    config.num_hidden_layers = 2 * options.layers
    setup = check_fits(run, training, config)
    assert setup is not None
    memory = predict_memory(setup)
    model = build_model(run, training, config, SpecialTokens(), lambda _: None)
    say(training, "built")
    count = options.samples * training.gradient_accumulation_steps * training.world_size
    data: Any = Samples(run.max_tokens // options.samples, count * options.steps)
    watch = Watch()
    callbacks: list[TrainerCallback] = [watch]
    if options.profile and training.should_log:
        callbacks.append(Profile(options.profile))
    trainer = OmniTrainer(
        model, training, run, model_folder=Path(), train_dataset=data, callbacks=callbacks
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if training.should_log:
        rates = sorted(step["tokens_per_sec"] for step in watch.steps[1:])
        gib = 2**30
        result = vars(options) | {
            "gpus": training.world_size,
            "tokens_per_sec_of_all": round(rates[len(rates) // 2], 1),
            "losses": [step["loss"] for step in watch.steps],
            "peak_gib": round(watch.steps[-1].get("peak_mem_gib", 0), 2),
            "predicted_gib": round(memory.peak / gib, 2),
            "parts": {n: round(size / gib, 2) for n, size in memory.phases[memory.phase].items()},
            "phase": memory.phase,
            "predicted_tokens_per_sec": round(speed(setup)[0], 1),
        }
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
