"""Measures both stages at the real shape with random weights: speed, MFU and peak memory.

    python -m tests.benchmarks.llama_omni.measure_gpu OUT [--steps 40] [--stages 1,2] [--key value]

Writes OUT/model (Llama-3.1-8B and Whisper-large-v3 shapes, 17 GB) and OUT/data (clips and answers
of the paper's mean lengths), then runs train.py as a user would. Further options go to train.py.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from llama_omni.speech.kmeans import KMeans, save_kmeans

FOLDER = Path(__file__).resolve().parents[3] / "llama_omni"
CLIP_SECONDS, ANSWER_TOKENS, NUM_UNITS = 7.5, 40, 554  # table 1 of arXiv 2409.06666
SKIPPED_STEPS = 10  # of warm-up


def make_dataset(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Writes noise clips, answers of random digits and units; lengths spread around the paper's."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        seconds = min(15.0, max(2.0, rng.gauss(CLIP_SECONDS, 2.5)))
        path = folder / "wav" / f"{i}.wav"
        soundfile.write(path, 0.1 * noise.standard_normal(int(seconds * 16000)), 16000)
        length = max(5, round(rng.gauss(ANSWER_TOKENS, 10)))
        units = max(20, round(length * NUM_UNITS / ANSWER_TOKENS * rng.uniform(0.8, 1.2)))
        record = {
            "speech_instruction_path": f"wav/{i}.wav",
            "text_instruction": "noise",
            "text_response": "".join(rng.choices("0123456789", k=length)),  # a token a digit
            "speech_response_path": f"wav/{i}.wav",
            "tgt_units": " ".join(str(rng.randrange(1000)) for _ in range(units)),
        }
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def write_kmeans(path: Path) -> None:
    """Writes random log-mel centroids, which extract nothing: the records bring their units."""
    centroids = torch.randn(1000, 80)
    save_kmeans(path, KMeans(centroids=centroids, durations=torch.ones(1000), features="log_mel"))


def run(*argv: object) -> None:
    command = [sys.executable, *map(str, argv)]
    sys.stdout.write(f"$ {' '.join(command)}\n")
    sys.stdout.flush()
    subprocess.run(command, check=True, cwd=FOLDER)


def report(out: Path) -> str:
    """Formats means over the log lines after the warm-up."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [m for m in lines if "train/loss" in m]
    lines = [m for m in lines if m["step"] > SKIPPED_STEPS] or lines
    mean = {key: sum(m[key] for m in lines) / len(lines) for key in lines[0]}
    return (
        f"{out.name}: {mean['speed/samples_per_sec']:.2f} samples/s, "
        f"{mean['speed/tokens_per_sec']:.0f} tokens/s, MFU {mean.get('speed/mfu', 0):.3f}, "
        f"peak {max(m.get('speed/peak_mem_gib', 0) for m in lines):.1f} GiB, "
        f"data time {mean['speed/data_time_frac']:.3f}, loss {lines[-1]['train/loss']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--shape", default="llama-3.1-8b")
    args, extra = parser.parse_known_args()
    out = args.out.resolve()
    data = out / "data" / "data.jsonl"
    if not data.is_file():
        make_dataset(data.parent, 32 * args.steps)
    if not (out / "model").is_dir():
        device = "cuda" if args.shape != "tiny" else "cpu"
        run(
            "-m", "llama_omni.tools.make_model", out / "model", "--shape", args.shape,
            "--device", device,
        )  # fmt: skip
    common = [
        "--max_steps", args.steps, "--save_strategy", "no", "--evaluation_strategy", "no",
        "--report_to", "none", "--data_path", data, *extra,
    ]  # fmt: skip
    if "1" in args.stages:
        run(
            "train.py", "configs/stage1_config.json", "--output_dir", out / "stage1",
            "--model_name_or_path", out / "model/llama",
            "--speech_encoder", out / "model/whisper", *common,
        )  # fmt: skip
        sys.stdout.write(report(out / "stage1") + "\n")
    if "2" in args.stages:
        write_kmeans(out / "kmeans.safetensors")
        run(
            "train.py", "configs/stage2_config.json", "--output_dir", out / "stage2",
            "--stage1_model_path", out / "stage1/final_model",
            "--kmeans_model_path", out / "kmeans.safetensors", *common,
        )  # fmt: skip
        sys.stdout.write(report(out / "stage2") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
