"""Trains a small LongCat-Flash-Omni from random weights on one GPU, and measures its answers.

    python -m tests.demos.vss_longcat_omni.small_result [--out runs/small_omni] [--steps 1150]

(from the repository's root). Made samples: a shape moves, a voice asks for its color, its shape or
its direction, another voice answers; so pictures and sound are needed. A model of 164M parameters,
both encoders among them, is trained for --steps; then held-out samples are asked, with combinations
and voices that are not in the training, and again with the video blanked and the question silenced.
In OUT are then the samples, the model, report/answers.jsonl and report/*.wav, and, where
PocketSphinx is installed, report/summary.json. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from tests.demos.vss_longcat_omni.end_to_end import ROOT, has_gpu, make_samples, num_cores, run, say

# With fewer samples, or in smaller steps, the model overfits to the shapes.
NUM_SAMPLES, NUM_HELD_OUT, NUM_STEPS, MAX_TOKENS = 32000, 240, 1150, 16384
MAX_FRAMES = 60  # of an answer, 60 ms each
MAX_WORKERS = 10  # that ask, each with a model on the GPU
# Compiling chains of so small operations takes longer than it saves.
ENV = {"TORCH_COMPILE_DISABLE": "1"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "small_omni")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--size", default="small", help="of tools/make_model.py")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT)
    options = parser.parse_args(argv)
    out = options.out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    make_samples(out / "data", num_training=options.samples, num_test=options.held_out)
    model = out / "model"
    if not (model / "config.json").is_file():
        run("a model with random weights", "python", "-m", "vss_longcat_omni.tools.make_model",
            model, "--data_dir", out / "data", "--size", options.size)  # fmt: skip
    if not (out / "trained" / "config.json").is_file():
        train(options)
    report = ("--data_dir", out / "data", "--codec", out / "cache" / "codec")
    report += ("--out", out / "report")
    workers = min(MAX_WORKERS, num_cores()) if has_gpu() else 1
    command = ("python", "-m", "vss_longcat_omni.tools.closed_questions")
    run("questions by voices that are not in the training", *command, "ask", *report,
        "--model_name_or_path", out / "trained", "--max_frames", str(MAX_FRAMES),
        "--workers", str(workers), env=ENV)  # fmt: skip
    if importlib.util.find_spec("pocketsphinx") is None:
        say("pocketsphinx is not installed: `closed_questions transcribe` is still to do\n")
        return 0
    run("transcripts of the wavs", *command, "transcribe", *report)
    return 0


def train(options: argparse.Namespace) -> None:
    """Train the whole model by train_ds.py."""
    out = options.out
    run(
        f"{options.steps} steps of training",
        "python", "train_ds.py", "--deepspeed", "", "--tuning", "full",
        "--model_name_or_path", out / "model", "--data_dir", out / "data",
        "--cache_dir", out / "cache", "--output_dir", out / "trained",
        "--max_steps", str(options.steps), "--warmup_steps", "0.05",
        "--learning_rate", str(options.learning_rate),
        # The audio encoder's gradients grow a hundredfold when the model begins to use the sound:
        # 0.999 would continue to divide by what they were before, and undo what was learned.
        "--adam_beta2", "0.95",
        "--max_tokens", str(options.max_tokens), "--gradient_accumulation_steps", "1",
        "--gradient_checkpointing", "false", "--logging_steps", "20", "--save_strategy", "no",
        "--report_to", "none", "--dataloader_num_workers", str(max(1, num_cores() - 2)),
        "--disable_tqdm", "true",
        *([] if has_gpu() else ["--use_cpu", "--bf16", "false"]),
        env=ENV,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
