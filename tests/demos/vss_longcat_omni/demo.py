"""The whole path on a tiny model, in a few minutes on a CPU: made samples to spoken answers.

    make demo FOLDER=vss_longcat_omni  (or: python -m tests.demos.vss_longcat_omni.demo)

Made samples (a shape moves, a voice asks, another one answers), a tiny model with random weights,
training by the documented `deepspeed --num_gpus=2 train_ds.py`, answers to held-out questions. In
runs/demo/vss_longcat_omni are then the samples, the model, answers/*.wav with their texts, loss.png
and summary.json. So short a training shows that every part works and that the loss falls; that
answers come out right takes a GPU (README). Exit status 1 if it did not learn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.demos.vss_longcat_omni.end_to_end import ROOT, has_gpu, make_samples, run, say

if TYPE_CHECKING:
    from pathlib import Path

OUT = ROOT / "runs" / "demo" / "vss_longcat_omni"
NUM_SAMPLES, NUM_HELD_OUT = 96, 4
STEPS = 90
MAX_LOSS_SHARE = 0.4  # of the first loss, that the last ones may be
AVERAGED = 5  # steps


def train() -> None:
    run(
        "a tiny model with random weights", "python", "-m", "vss_longcat_omni.tools.make_model",
        OUT / "model", "--data_dir", OUT / "data", "--size", "tiny",
    )  # fmt: skip
    processor = [] if has_gpu() else ["--use_cpu"]
    env = {"TENSORBOARD_LOGGING_DIR": str(OUT / "tensorboard_logs"), "PYTHONWARNINGS": "ignore"}
    if not has_gpu():
        env["DS_ACCELERATOR"] = "cpu"
    run(
        "training of all its weights under ZeRO-3 (the first time, DeepSpeed builds an operator)",
        "deepspeed", "--num_gpus=2", "train_ds.py", *processor, "--tuning", "full",
        "--model_name_or_path", OUT / "model", "--data_dir", OUT / "data",
        "--cache_dir", OUT / "cache", "--output_dir", OUT / "trained",
        "--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", str(STEPS),
        "--gradient_accumulation_steps", "1", "--max_tokens", "600", "--learning_rate", "5e-3",
        "--dataloader_num_workers", "0", "--gradient_checkpointing", "false",
        env=env,
    )  # fmt: skip


def answer() -> None:
    run(
        "answers to questions by voices that are not in the training", "python", "-m",
        "vss_longcat_omni.generate", "--model_name_or_path", OUT / "trained",
        "--codec", OUT / "cache" / "codec", "--data_dir", OUT / "data", "--split", "test",
        "--out", OUT / "answers", "--max_frames", "40",
    )  # fmt: skip


def read_losses() -> list[dict[str, Any]]:
    """Return what was logged, step by step."""
    (state,) = (OUT / "trained").glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def plot(path: Path, history: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4))
    for term in ("text", "audio", "semantic"):
        panel.plot([e["step"] for e in history], [e[f"{term}_loss"] for e in history], label=term)
    panel.set(title="training loss, nats a target", xlabel="step", ylim=(0, None))
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    make_samples(OUT / "data", num_training=NUM_SAMPLES, num_test=NUM_HELD_OUT)
    run("what is wrong with them", "python", "-m", "vss_longcat_omni.dataset", "check",
        OUT / "data", "--headers_only")  # fmt: skip
    train()
    answer()
    history = read_losses()
    plot(OUT / "loss.png", history)
    losses = [entry["loss"] for entry in history]
    summary = {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": sum(losses[-AVERAGED:]) / AVERAGED,
        "answers": len(list((OUT / "answers").glob("*.wav"))),
        "minutes": (time.monotonic() - started) / 60,
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(
        f"\nloss {summary['first_loss']:.2f} -> {summary['last_loss']:.2f} in {STEPS} steps; "
        f"{summary['minutes']:.1f} minutes; answers/, loss.png and summary.json are in "
        f"{OUT.relative_to(ROOT)}\n"
    )
    if summary["last_loss"] > MAX_LOSS_SHARE * summary["first_loss"] or not summary["answers"]:
        say("the demo failed: the loss did not fall, or no answer was spoken\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
