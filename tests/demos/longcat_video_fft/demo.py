"""The whole path on a tiny model, in a few minutes on a CPU: made videos to a generated mp4.

    make demo FOLDER=longcat_video_fft  (or: python -m tests.demos.longcat_video_fft.demo)

Made videos, a VAE and a transformer from nothing, the cache by the documented command, training by
`accelerate launch`, export, `generate`. In runs/demo/longcat_video_fft are then generated.mp4,
grid.png, loss.png and summary.json. So short a training shows that every part works and that the
loss falls; small_result.py shows on a GPU that prompts are followed. Exit status 1 if it did not
learn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from longcat_video_fft.options.launch import start_logging
from tests.demos.longcat_video_fft.end_to_end import (
    ROOT,
    EndToEndRun,
    run_command,
    run_stage,
    say,
    stage_seconds,
)
from tests.demos.longcat_video_fft.evaluator import draw_grid, generate_videos, load, read_prompts

OUT = ROOT / "runs" / "demo" / "longcat_video_fft"
ACCELERATE = (
    "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=1", "--num_machines=1",
    "--mixed_precision=no", "--dynamo_backend=no",
)  # fmt: skip
STEPS, GUIDANCE = 20, 4.0
NUM_PROMPTS = 4
MAX_LOSS_SHARE = 0.75  # of the first losses, that the last ones may be
AVERAGED = 5  # log lines


def demo_run(out: Path) -> EndToEndRun:
    return EndToEndRun(
        out=out,
        configs=Path(__file__).parent / "demo",
        size="demo",
        num_videos=192,
        num_held_out=NUM_PROMPTS,
        width=48,
        height=32,
        num_frames=5,
        vae_argv=("--minutes", "1.5", "--base-dim", "8", "--batch-size", "4"),
        cache_processes=1,
        launcher=ACCELERATE,
    )


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    started = time.monotonic()
    start_logging(is_main=True)
    e2e = demo_run(OUT)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for name, work in e2e.stages().items():
        run_stage(e2e, name, work)
    summary = use(e2e)
    summary["minutes"] = (time.monotonic() - started) / 60
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(
        f"\nloss {summary['first_loss']:.2f} -> {summary['last_loss']:.2f} in "
        f"{summary['steps']} steps; {summary['minutes']:.1f} minutes; generated.mp4, grid.png, "
        f"loss.png and summary.json are in {OUT.relative_to(ROOT)}\n"
    )
    if not summary["last_loss"] < MAX_LOSS_SHARE * summary["first_loss"]:
        say("the demo failed: the loss did not fall\n")
        return 1
    return 0


def use(e2e: EndToEndRun) -> dict[str, Any]:
    """Generates with what was trained; returns the numbers."""
    prompts = list(read_prompts(e2e).values())
    say("\n== use\n")
    run_command(
        e2e, "longcat_video_fft.generate", "--model", "export", "--prompt", prompts[0],
        "--num-inference-steps", STEPS, "--num-frames", e2e.num_frames,
        "--height", e2e.height, "--width", e2e.width, "--output", "generated.mp4",
    )  # fmt: skip
    videos = generate_videos(load(e2e), e2e, prompts, steps=STEPS, guidance=GUIDANCE)
    draw_grid(e2e.out / "grid.png", prompts, videos, columns=1)
    steps, losses = read_losses(e2e.out / "output" / "metrics.jsonl")
    plot(e2e.out / "loss.png", steps, losses)
    return {
        "steps": steps[-1],
        "first_loss": sum(losses[:AVERAGED]) / AVERAGED,
        "last_loss": sum(losses[-AVERAGED:]) / AVERAGED,
        "stage_seconds": stage_seconds(e2e.out),
        "vae": json.loads((e2e.out / "vae" / "training.json").read_text()),
    }


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    return [step for step, _ in points], [loss for _, loss in points]


def plot(path: Path, steps: list[int], losses: list[float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4))
    panel.plot(steps, losses)
    panel.set(title="training loss", xlabel="step", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
