"""A small LongCat-Flash-Omni from nothing on one GPU: does it answer what it is asked?

    python -m vss_longcat_omni.small_result [--out runs/small_omni] [--minutes 5]

(from the repository's root). Made samples: a shape moves, a voice asks for its colour, its shape or
its direction, another voice answers; so both senses are needed. A model of 140M parameters, eyes
and ears among them, is trained whole for about --minutes; then held-out samples are asked, with
combinations and voices that it never met, and again with the video blanked and the question
silenced. In OUT are then the samples, the model, report/answers.jsonl and report/*.wav, and, where
PocketSphinx is installed, report/summary.json. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "vss_longcat_omni"
NUM_SAMPLES, NUM_HELD_OUT = 6000, 240
TRIAL_STEPS = 40  # how fast a step is, before the number of steps is chosen
FILL = 0.97  # of a pack
MAX_ROWS = 60  # of an answer, 60 ms each


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "small_omni")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--size", default="small", help="of make_model.py")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT)
    options = parser.parse_args(argv)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    make_samples(out, options.samples, options.held_out)
    model = out / "model"
    if not (model / "config.json").is_file():
        run("a model with random weights", "-m", "vss_longcat_omni.make_model", model,
            "--data_dir", out / "data", "--size", options.size)  # fmt: skip
    if not (out / "trained" / "config.json").is_file():
        max_tokens = options.max_tokens
        log = train(out, steps=TRIAL_STEPS, name="trial", max_tokens=max_tokens)
        steps = options.minutes * 60 * tokens_per_sec(log) / (FILL * max_tokens)
        train(out, steps=max(1, int(steps)), name="trained", max_tokens=max_tokens)
    asked = ("--model_name_or_path", out / "trained", "--codec", out / "cache" / "codec")
    asked += ("--data_dir", out / "data", "--out", out / "report")
    run("questions by voices it never heard", "-m", "vss_longcat_omni.judge", "ask", *asked,
        "--max_rows", str(MAX_ROWS), "--workers", "4" if has_gpu() else "1")  # fmt: skip
    if importlib.util.find_spec("pocketsphinx") is None:
        say("pocketsphinx is not installed: `python -m vss_longcat_omni.judge hear` is still to do")
        return 0
    run("what is heard", "-m", "vss_longcat_omni.judge", "hear", *asked[2:])
    return 0


def make_samples(out: Path, num_samples: int, num_held_out: int) -> None:
    for split, name, count, seed in (
        ("train", "training", num_samples, 0),
        ("test", "test", num_held_out, 1),
    ):
        run(f"{count} samples: {name}", "-m", "data.make_vss", out / "data" / name,
            "--split", split, "--count", str(count), "--seed", str(seed),
            "--workers", str(num_workers()))  # fmt: skip


def train(out: Path, *, steps: int, name: str, max_tokens: int) -> str:
    """The whole model for so many steps, by train_ds.py; what it wrote on stdout."""
    return run(
        f"{steps} steps of training", "train_ds.py", "--deepspeed", "", "--tuning", "full",
        "--model_name_or_path", out / "model", "--data_dir", out / "data",
        "--cache_dir", out / "cache", "--output_dir", out / name,
        "--max_steps", str(steps), "--warmup_steps", "0.05", "--learning_rate", "5e-4",
        "--max_tokens", str(max_tokens), "--gradient_accumulation_steps", "1",
        "--gradient_checkpointing", "false", "--logging_steps", "20", "--save_strategy", "no",
        "--report_to", "none", "--dataloader_num_workers", str(num_workers()),
        "--disable_tqdm", "true",
        *([] if has_gpu() else ["--use_cpu", "--bf16", "false"]),
    )  # fmt: skip


def tokens_per_sec(log: str) -> float:
    """The last rate that was logged: the first ones count what is compiled."""
    return float(re.findall(r"'tokens_per_sec': '?([\d.e+]+)", log)[-1])


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def num_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) - 2)


def run(title: str, *words: str | Path) -> str:
    """Runs Python with these words; its stdout is shown and returned."""
    started = time.monotonic()
    say(f"\n== {title}\n$ python {' '.join(map(str, words))}")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-u", *map(str, words)],
        cwd=FOLDER if words[0] == "train_ds.py" else ROOT,
        # Compiling chains of so small operations takes longer than it saves.
        env={"TORCH_COMPILE_DISABLE": "1", **os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"{title}: failed with exit status {process.returncode}")
    say(f"({time.monotonic() - started:.0f} s)")
    return "".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
