"""A small LongCat-Video from nothing on one GPU: does it make what a prompt asks for?

    python -m tests.demos.longcat_video_fft.small_result [--out runs/small] [--minutes 9.5] [--more]

Made videos of moving shapes, a small Wan VAE, a transformer of 71M parameters under a UMT5 with
fixed random weights; then 100 prompts with combinations of color, shape and direction that no
training video shows. --minutes stops the training in time for the evaluation; without them it runs
to the config's last step. The same command continues, and with --more also where the training had
been stopped in time for an evaluation. In OUT are then result.json, grid.png and generated/*.mp4.
Exit status 1 if less than 80 % of colors or directions are right, 3 if there was no time left.
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
from tests.demos.longcat_video_fft.end_to_end import (
    HELD_OUT,
    ROOT,
    EndToEndRun,
    OutOfTimeError,
    reopen_stages,
    run_stage,
    say,
    stage_seconds,
)
from tests.demos.longcat_video_fft.evaluator import (
    describe,
    draw_grid,
    evaluate,
    generate_videos,
    load,
    read_prompts,
)

MIN_RIGHT = 0.8
MIN_RIGHT_VAE = 0.95  # of true videos, encoded and decoded
NUM_VIDEOS = 5120  # a multiple of the batch
NUM_PROMPTS = 100
GUIDANCE = 4.0  # the official one; the result is at this one
OTHER_GUIDANCE = (1.0, 2.0, 6.0)  # shown beside it
STEPS = 40
GRID_PROMPTS = 12
EVALUATION_SECONDS = 80.0  # export and evaluation


def main(argv: list[str] | None = None) -> int:
    start_logging(is_main=True)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "small")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that this call may take")
    parser.add_argument("--vae-minutes", type=float, default=2.5)
    parser.add_argument("--more", action="store_true", help="train on from the last checkpoint")
    args = parser.parse_args(argv)
    e2e = small_run(args.out.absolute(), minutes=args.minutes, vae_minutes=args.vae_minutes)
    e2e.out.mkdir(parents=True, exist_ok=True)
    if args.more:
        reopen_stages(e2e.out, "train", "export")
    try:
        for name, work in e2e.stages().items():
            run_stage(e2e, name, work)
            if name == "vae" and not is_good(vae_alone(e2e), MIN_RIGHT_VAE):
                reopen_stages(e2e.out, "vae")
                say("\nthe VAE loses what it must show; the same command trains it on\n")
                return 1
    except OutOfTimeError as error:
        say(f"\nstopped: {error}. The same command continues.\n")
        return 3
    if not is_good(report(e2e), MIN_RIGHT):
        say(f"\nless than {MIN_RIGHT:.0%} is right: train on with --more\n")
        return 1
    return 0


def small_run(out: Path, *, minutes: float, vae_minutes: float) -> EndToEndRun:
    return EndToEndRun(
        out=out,
        configs=Path(__file__).parent / "small",
        size="small",
        num_videos=NUM_VIDEOS,
        num_held_out=NUM_PROMPTS,
        width=96,
        height=64,
        num_frames=13,
        vae_argv=("--minutes", str(vae_minutes)),
        cache_processes=4,
        launcher=(),
        seconds=minutes * 60,
        reserve=EVALUATION_SECONDS,
    )


def report(e2e: EndToEndRun) -> dict[str, float]:
    """Writes the result and the pictures; returns what is right at the official guidance."""
    say("\n== evaluate\n")
    started = time.monotonic()
    prompts = read_prompts(e2e)
    names, texts = list(prompts), list(prompts.values())
    results: dict[float, dict[str, Any]] = {}
    pipe = load(e2e)
    for guidance in (GUIDANCE, *OTHER_GUIDANCE):
        is_official = guidance == GUIDANCE
        videos = generate_videos(pipe, e2e, texts, steps=STEPS, guidance=guidance)
        folder = "generated" if is_official else f"guidance-{guidance:g}"
        results[guidance] = evaluate(e2e, folder, names, videos)
        say(f"guidance {guidance:g}: {describe(results[guidance])}\n")
        if is_official:
            draw_grid(e2e.out / "grid.png", texts[:GRID_PROMPTS], videos[:GRID_PROMPTS])
    result = {
        "guidance": GUIDANCE,
        "steps": STEPS,
        **results[GUIDANCE],
        "right_by_guidance": {f"{g:g}": r["right"] for g, r in sorted(results.items())},
        "vae_alone": vae_alone(e2e),
        "training": last_metrics(e2e.out / "output" / "metrics.jsonl"),
        "vae": json.loads((e2e.out / "vae" / "training.json").read_text()),
    }
    result["stage_seconds"] = {**stage_seconds(e2e.out), "evaluate": time.monotonic() - started}
    (e2e.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result["stage_seconds"]) + "\n")
    return result["right"]


def is_good(right: dict[str, float], least: float) -> bool:
    return min(right["color"], right["direction"]) >= least


def vae_alone(e2e: EndToEndRun) -> dict[str, float]:
    """Evaluates the true held-out videos, encoded and decoded: no model can do better."""
    import numpy as np
    import torch

    from tests.demos.longcat_video_fft.small_vae import decode, encode, load_vae, to_pixels
    from tests.demos.longcat_video_fft.train_vae import read_videos

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(e2e.out / "vae").eval().to(device)
    names = [path.stem for path in sorted((e2e.out / HELD_OUT).rglob("*.mp4"))]
    videos = read_videos(e2e.out / HELD_OUT, num_frames=e2e.num_frames)
    parts = []
    with torch.inference_mode():
        for part in torch.from_numpy(videos).split(25):
            pixels = to_pixels(part.to(device))
            decoded = decode(vae, encode(vae, pixels).chunk(2, dim=1)[0]).clamp(-1, 1)
            parts.append(
                ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
            )
    result = evaluate(e2e, "vae-alone", names, np.concatenate(parts))
    say(f"the VAE alone: {describe(result)}\n")
    return result["right"]


def last_metrics(path: Path) -> dict[str, Any]:
    """Returns the training's last line with a loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next((line for line in reversed(lines) if "train/loss" in line), {})


if __name__ == "__main__":
    sys.exit(main())
