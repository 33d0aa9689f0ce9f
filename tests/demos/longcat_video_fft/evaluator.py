"""Evaluates what a model makes of prompts with combinations that no training video shows.

    captions of HELD_OUT -> videos -> OUT/generated/*.mp4 -> data.read_videos -> shares right
                                   -> grid.png

The detector lies in the repository's data/ and looks at the finished mp4 files. small_result.py and
demo.py use this.
"""

from __future__ import annotations

import json
import subprocess
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.demos.longcat_video_fft.end_to_end import HELD_OUT, command, environment, say, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.demos.longcat_video_fft.end_to_end import EndToEndRun

BATCH = 50
GRID_FRAMES = 5
GAP = 2  # pixels between frames
LETTER_WIDTH, LINE_HEIGHT = 6, 13


def read_prompts(e2e: EndToEndRun) -> dict[str, str]:
    """Returns the prompts by name, in the names' order."""
    paths = sorted((e2e.out / HELD_OUT).rglob("*.txt"))
    return {path.stem: path.read_text("utf-8") for path in paths}


def load(e2e: EndToEndRun) -> Any:
    """Loads the exported pipeline, on the GPU where there is one."""
    import torch

    from longcat_video_fft.generate import load_pipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else None
    pipe = load_pipeline(e2e.out / "export", dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_videos(
    pipe: Any,
    e2e: EndToEndRun,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
) -> np.ndarray:
    """Generates (N, T, H, W, 3) uint8 by the pipeline's own call."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), BATCH):
        frames = pipe(
            list(prompts[start : start + BATCH]), "", height=e2e.height, width=e2e.width,
            num_frames=e2e.num_frames, num_inference_steps=steps, guidance_scale=guidance,
            generator=generator, output_type="np",
        ).frames  # fmt: skip
        parts.append((frames * 255 + 0.5).astype(np.uint8))
    return np.concatenate(parts)


def evaluate(
    e2e: EndToEndRun, folder: str, names: Sequence[str], videos: np.ndarray
) -> dict[str, Any]:
    """Writes OUT/`folder`/NAME.mp4 and OUT/`folder`.jsonl; returns what data.read_videos finds.

    Raises:
        SystemExit: it failed.
    """
    from longcat_video_fft.media.video_file import write_mp4

    for name, video in zip(names, videos, strict=True):
        write_mp4(e2e.out / folder / f"{name}.mp4", video)
    argv = command("data.read_videos", folder, HELD_OUT, "--readings", f"{folder}.jsonl")
    say(f"$ {shown(argv)}\n")
    done = subprocess.run(
        argv, cwd=e2e.out, env=environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"data.read_videos: failed with exit status {done.returncode}")
    return json.loads(done.stdout)


def describe(result: dict[str, Any]) -> str:
    """Formats the shares in one line."""
    parts = [
        f"{name} {share:.0%} (another prompt's {result['against_another_caption'][name]:.0%}, "
        f"chance {result['chance'][name]:.1%})"
        for name, share in result["right"].items()
    ]
    return f"right of {result['videos']} prompts: {', '.join(parts)}"


def draw_grid(path: Path, prompts: Sequence[str], videos: np.ndarray, *, columns: int = 2) -> None:
    """Draws a PNG: each prompt over some frames of its video, first to last."""
    from PIL import Image, ImageDraw

    _, num_frames, height, width, _ = videos.shape
    chosen = np.linspace(0, num_frames - 1, min(GRID_FRAMES, num_frames)).round().astype(int)
    strip = len(chosen) * (width + GAP) - GAP
    texts = [textwrap.wrap(prompt, strip // LETTER_WIDTH) for prompt in prompts]
    text_height = max(map(len, texts)) * LINE_HEIGHT
    cell_width, cell_height = strip + 4 * GAP, text_height + height + 4 * GAP
    rows = -(-len(prompts) // columns)
    picture = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (lines, video) in enumerate(zip(texts, videos, strict=True)):
        left, top = number % columns * cell_width, number // columns * cell_height
        for place, line in enumerate(lines):
            draw.text((left, top + place * LINE_HEIGHT), line, fill="black")
        for place, frame in enumerate(chosen):
            at = (left + place * (width + GAP), top + text_height)
            picture.paste(Image.fromarray(video[frame]), at)
    picture.save(path, optimize=True)
