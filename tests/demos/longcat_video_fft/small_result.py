"""A small LongCat-Video from nothing on one GPU: does it make what a prompt asks for?

    python -m tests.demos.longcat_video_fft.small_result [--out runs/small] [--minutes 9.5] [--more]

Made videos of moving shapes, a small Wan VAE, a transformer of 71M parameters under a UMT5 with
fixed random weights; then 100 prompts with combinations of colour, shape and direction that no
training video shows. --minutes stops the training in time for the judge; without them it goes to
the config's last step. The same command goes on, and with --more also where the training had been
stopped in time for a judge. In OUT are then result.json, grid.png and generated/*.mp4. Exit status
1 if less than 80 % of colours or directions are right, 3 if there was no time left.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from longcat_video_fft.options.launch import start_logging
from tests.demos.longcat_video_fft.judge import (
    describe,
    draw_grid,
    generate_videos,
    judge,
    load,
    read_prompts,
)
from tests.demos.longcat_video_fft.trial import (
    HELD_OUT,
    ROOT,
    OutOfTimeError,
    Trial,
    reopen_stages,
    run_stage,
    say,
    stage_seconds,
)

MIN_RIGHT = 0.8
MIN_RIGHT_VAE = 0.95  # of true videos, encoded and decoded
NUM_VIDEOS = 5120  # a multiple of the batch
NUM_PROMPTS = 100
GUIDANCE = 4.0  # the official one; the result is at this one
OTHER_GUIDANCE = (1.0, 2.0, 6.0)  # shown beside it
STEPS = 40
GRID_PROMPTS = 12
JUDGE_SECONDS = 80.0  # export and judge


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "small")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that this call may take")
    parser.add_argument("--vae-minutes", type=float, default=2.5)
    parser.add_argument("--more", action="store_true", help="train on from the last checkpoint")
    args = parser.parse_args(argv)
    trial = small_trial(args.out.absolute(), minutes=args.minutes, vae_minutes=args.vae_minutes)
    trial.out.mkdir(parents=True, exist_ok=True)
    if args.more:
        reopen_stages(trial.out, "train", "export")
    try:
        for name, work in trial.stages().items():
            run_stage(trial, name, work)
            if name == "vae" and not is_good(vae_alone(trial), MIN_RIGHT_VAE):
                reopen_stages(trial.out, "vae")
                say("\nthe VAE loses what it must show; the same command trains it on\n")
                return 1
    except OutOfTimeError as error:
        say(f"\nstopped: {error}. The same command goes on.\n")
        return 3
    if not is_good(report(trial), MIN_RIGHT):
        say(f"\nless than {MIN_RIGHT:.0%} is right: train on with --more\n")
        return 1
    return 0


def small_trial(out: Path, *, minutes: float, vae_minutes: float) -> Trial:
    return Trial(
        out=out,
        configs=Path(__file__).parent / "small",
        size="small",
        num_videos=NUM_VIDEOS,
        num_held_out=NUM_PROMPTS,
        width=96,
        height=64,
        num_frames=13,
        vae_words=("--minutes", str(vae_minutes)),
        cache_processes=4,
        launcher=(),
        seconds=minutes * 60,
        reserve=JUDGE_SECONDS,
    )


def report(trial: Trial) -> dict[str, float]:
    """Writes the result and the pictures; returns what is right at the official guidance."""
    say("\n== judge\n")
    started = time.monotonic()
    prompts = read_prompts(trial)
    names, texts = list(prompts), list(prompts.values())
    results: dict[float, dict[str, Any]] = {}
    pipe = load(trial)
    for guidance in (GUIDANCE, *OTHER_GUIDANCE):
        is_official = guidance == GUIDANCE
        videos = generate_videos(pipe, trial, texts, steps=STEPS, guidance=guidance)
        folder = "generated" if is_official else f"guidance-{guidance:g}"
        results[guidance] = judge(trial, folder, names, videos)
        say(f"guidance {guidance:g}: {describe(results[guidance])}\n")
        if is_official:
            draw_grid(trial.out / "grid.png", texts[:GRID_PROMPTS], videos[:GRID_PROMPTS])
    result = {
        "guidance": GUIDANCE,
        "steps": STEPS,
        **results[GUIDANCE],
        "right_by_guidance": {f"{g:g}": r["right"] for g, r in sorted(results.items())},
        "vae_alone": vae_alone(trial),
        "training": last_metrics(trial.out / "output" / "metrics.jsonl"),
        "vae": json.loads((trial.out / "vae" / "training.json").read_text()),
    }
    result["stage_seconds"] = {**stage_seconds(trial.out), "judge": time.monotonic() - started}
    (trial.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result["stage_seconds"]) + "\n")
    return result["right"]


def is_good(right: dict[str, float], least: float) -> bool:
    return min(right["colour"], right["direction"]) >= least


def vae_alone(trial: Trial) -> dict[str, float]:
    """What is right of the true held-out videos, encoded and decoded: no model can do better."""
    import numpy as np
    import torch

    from tests.demos.longcat_video_fft.small_vae import decode, encode, load_vae, to_pixels
    from tests.demos.longcat_video_fft.train_vae import read_videos

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(trial.out / "vae").eval().to(device)
    names = [path.stem for path in sorted((trial.out / HELD_OUT).rglob("*.mp4"))]
    videos = read_videos(trial.out / HELD_OUT, num_frames=trial.num_frames)
    parts = []
    with torch.inference_mode():
        for part in torch.from_numpy(videos).split(25):
            pixels = to_pixels(part.to(device))
            decoded = decode(vae, encode(vae, pixels).chunk(2, dim=1)[0]).clamp(-1, 1)
            parts.append(
                ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
            )
    result = judge(trial, "vae-alone", names, np.concatenate(parts))
    say(f"the VAE alone: {describe(result)}\n")
    return result["right"]


def last_metrics(path: Path) -> dict[str, Any]:
    """The training's last line with a loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next((line for line in reversed(lines) if "train/loss" in line), {})


if __name__ == "__main__":
    sys.exit(main())
