"""A small LongCat-Video from nothing on one GPU: does it make what a prompt asks for?

    python -m longcat_video_fft.small_result [--out runs/small] [--minutes 9.5]

Made videos of moving shapes, a small Wan VAE, a transformer of 72M parameters under a UMT5 with
fixed random weights; then 100 prompts with combinations of colour, shape and direction that no
training video shows. --minutes stops the training in time for the judge; without them it goes to
the config's last step. The same command goes on. In OUT are then result.json, readings.jsonl,
grid.png and some mp4 files. Exit status 1 if less than 80 % of colours or directions are right.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from longcat_video_fft import judge
from longcat_video_fft.precompute import start_logging
from longcat_video_fft.trial import ROOT, OutOfTimeError, Trial, read_stages, run_stage, say

logger = logging.getLogger("longcat_video_fft")

MIN_RIGHT = 0.8
NUM_VIDEOS = 5120  # a multiple of the batch
NUM_PROMPTS = 100
GUIDANCE = 4.0  # the official one; the result is at this one
OTHER_GUIDANCE = (1.0, 2.0, 6.0)  # shown beside it
STEPS = 40
GRID_PROMPTS = 12
JUDGE_SECONDS = 75.0


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "small")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that this call may take")
    parser.add_argument("--vae-minutes", type=float, default=3.0)
    args = parser.parse_args(argv)
    trial = Trial(
        out=args.out.absolute(),
        configs=Path(__file__).parent / "small",
        size="small",
        num_videos=NUM_VIDEOS,
        num_held_out=NUM_PROMPTS,
        width=96,
        height=64,
        num_frames=13,
        vae_words=("--minutes", str(args.vae_minutes)),
        cache_processes=4,
        launcher=(),
        seconds=args.minutes * 60,
        reserve=JUDGE_SECONDS,
    )
    trial.out.mkdir(parents=True, exist_ok=True)
    try:
        for name, work in trial.stages().items():
            run_stage(trial, name, work)
    except OutOfTimeError as error:
        say(f"\nstopped: {error}. The same command goes on.\n")
        return 3
    return judge_trial(trial)


def judge_trial(trial: Trial) -> int:
    """Writes the result; 0 if enough is right at the official guidance."""
    say("\n== judge\n")
    started = time.monotonic()
    scenes = judge.held_out_prompts(NUM_PROMPTS)
    prompts = [scene.caption for scene in scenes]
    shape: dict[str, Any] = {
        "num_frames": trial.num_frames, "height": trial.height, "width": trial.width,
    }  # fmt: skip
    by_guidance = {}
    for guidance in (GUIDANCE, *OTHER_GUIDANCE):
        videos = judge.generate_videos(
            trial.out / "export", prompts, steps=STEPS, guidance=guidance, **shape
        )
        readings = judge.read_videos(scenes, videos)
        say(judge.describe(f"guidance {guidance:g}", readings) + "\n")
        by_guidance[guidance] = judge.shares(readings)
        if guidance == GUIDANCE:
            save_pictures(trial, prompts, videos)
            judge.write_readings(trial.out / "readings.jsonl", readings)
            against_another = judge.shares(readings, turned=1)
    right = by_guidance[GUIDANCE]
    result = {
        "right": right,
        "chance": judge.CHANCE,
        "against_another_prompt": against_another,  # pyright: ignore[reportPossiblyUnbound]
        "by_guidance": by_guidance,
        "steps": STEPS,
        "training": last_metrics(trial.out / "output" / "metrics.jsonl"),
        "vae": json.loads((trial.out / "vae" / "training.json").read_text()),
        "stage_seconds": {**read_stages(trial.out), "judge": time.monotonic() - started},
    }
    (trial.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result["stage_seconds"]) + "\n")
    if min(right["colour"], right["direction"]) < MIN_RIGHT:
        say(f"\nless than {MIN_RIGHT:.0%} is right: train longer\n")
        return 1
    return 0


def save_pictures(trial: Trial, prompts: list[str], videos: Any) -> None:
    from longcat_video_fft.video_file import write_mp4

    judge.draw_grid(trial.out / "grid.png", prompts[:GRID_PROMPTS], videos[:GRID_PROMPTS])
    for number in range(GRID_PROMPTS):
        write_mp4(trial.out / "videos" / f"{number:02d}.mp4", videos[number])


def last_metrics(path: Path) -> dict[str, Any]:
    """The training's last line with a loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next((line for line in reversed(lines) if "train/loss" in line), {})


if __name__ == "__main__":
    sys.exit(main())
