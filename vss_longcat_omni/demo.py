"""The whole path on a tiny model, in a few minutes on a CPU: made samples to spoken answers.

    make demo FOLDER=vss_longcat_omni     (or: python -m vss_longcat_omni.demo, from the root)

Made samples (a shape moves, a voice asks, another one answers), a tiny model with random weights,
training by the documented `deepspeed --num_gpus=2 train_ds.py`, answers to held-out questions. In
runs/demo/vss_longcat_omni are then the samples, the model, answers/*.wav with their texts, loss.png
and summary.json. So short a training shows that every part works and that the loss falls; that
answers come out right takes a GPU (README). Exit status 1 if it did not learn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "vss_longcat_omni"
OUT = ROOT / "runs" / "demo" / "vss_longcat_omni"
NUM_SAMPLES, NUM_HELD_OUT = 96, 4
STEPS = 90
MAX_LOSS_SHARE = 0.4  # of the first loss, that the last ones may be
AVERAGED = 5  # steps


def run(title: str, *words: str | Path, cwd: Path = FOLDER) -> None:
    """Runs one command with its output shown, and says what it is."""
    say(f"\n== {title}\n$ {' '.join(map(shown, words))}\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        "TENSORBOARD_LOGGING_DIR": str(OUT / "tensorboard_logs"),
    }
    if not shutil.which("nvidia-smi"):
        environment["DS_ACCELERATOR"] = "cpu"
    command = [str(word) for word in words]
    if command[0] in ("python", "deepspeed"):
        command[0] = str(Path(sys.executable).parent / command[0])
    result = subprocess.run(command, cwd=cwd, env=environment, check=False)
    if result.returncode:
        raise SystemExit(f"{title}: failed with exit status {result.returncode}")


def shown(word: str | Path) -> str:
    """Paths below the repository relative to the folder, as a reader would type them."""
    return os.path.relpath(word, FOLDER) if isinstance(word, Path) else word


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def make_samples() -> None:
    for split, count, seed in (("training", NUM_SAMPLES, 0), ("test", NUM_HELD_OUT, 1)):
        run(
            f"{count} samples: {split}", "python", "-m", "data.make_vss", OUT / "data" / split,
            "--count", str(count), "--seed", str(seed), "--workers", "2",
            "--split", "train" if split == "training" else "test", cwd=ROOT,
        )  # fmt: skip
    run("what is wrong with them", "python", "-m", "vss_longcat_omni.dataset", "check",
        OUT / "data", "--headers_only")  # fmt: skip


def train() -> None:
    run(
        "a tiny model with random weights", "python", "-m", "vss_longcat_omni.make_model",
        OUT / "model", "--data_dir", OUT / "data", "--size", "tiny",
    )  # fmt: skip
    processor = [] if shutil.which("nvidia-smi") else ["--use_cpu"]
    run(
        "training of all its weights under ZeRO-3 (the first time, DeepSpeed builds an operator)",
        "deepspeed", "--num_gpus=2", "train_ds.py", *processor, "--tuning", "full",
        "--model_name_or_path", OUT / "model", "--data_dir", OUT / "data",
        "--cache_dir", OUT / "cache", "--output_dir", OUT / "trained",
        "--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", str(STEPS),
        "--gradient_accumulation_steps", "1", "--max_tokens", "600", "--learning_rate", "5e-3",
        "--dataloader_num_workers", "0", "--gradient_checkpointing", "false",
    )  # fmt: skip


def answer() -> None:
    run(
        "answers to questions by voices it never heard", "python", "-m",
        "vss_longcat_omni.generate", "--model_name_or_path", OUT / "trained",
        "--codec", OUT / "cache" / "codec", "--data_dir", OUT / "data", "--split", "test",
        "--out", OUT / "answers", "--max_rows", "40",
    )  # fmt: skip


def read_losses() -> list[dict[str, Any]]:
    """What was logged, step by step."""
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
    make_samples()
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
