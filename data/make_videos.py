"""Make short H.264 videos of moving colored shapes, each with its caption beside it.

shapes.py (what is shown) -> frames -> OUT/000/000000.mp4 and OUT/000/000000.txt. All is a function
of the arguments: the same ones give the same bytes, whatever the number of workers.

    python -m data.make_videos OUT --count 2000 --seed 0 --split train --workers 2
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from tqdm import tqdm

from data.shapes import MIN_SIDE, SPLITS, list_combinations, render_scene, scene_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

SETTINGS_NAME = ".make_videos.json"  # hidden: whoever reads the videos need not know it
CRF_RANGE = (1, 51)  # 0 is lossless, in a profile that many players do not have
MIN_FRAMES = 3  # the detector compares the first third with the last


@dataclass(frozen=True)
class VideoSet:
    """What `make_videos` made."""

    folder: Path
    num_videos: int
    num_made: int  # of these, made by this call; the others were there


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a video's bytes and name depend on; a bad field raises ValueError that names it."""

    seed: int
    width: int
    height: int
    fps: int
    seconds: float
    split: str
    directions: int
    crf: int
    per_folder: int

    def __post_init__(self) -> None:
        for field in ("width", "height"):
            value = getattr(self, field)
            if value < MIN_SIDE or value % 2:
                raise ValueError(f"{field}={value}: must be even (yuv420p) and at least {MIN_SIDE}")
        if self.fps < 1:
            raise ValueError(f"fps={self.fps}: must be 1 or more")
        if not MIN_FRAMES <= self.seconds * self.fps < 1e6:
            raise ValueError(
                f"seconds={self.seconds}: {self.seconds * self.fps:g} frames at fps={self.fps}; "
                f"give {MIN_FRAMES / self.fps:.3g} seconds or more, and less than a million frames"
            )
        if not CRF_RANGE[0] <= self.crf <= CRF_RANGE[1]:
            raise ValueError(f"crf={self.crf}: must lie in {CRF_RANGE[0]} to {CRF_RANGE[1]}")
        if self.per_folder < 1:
            raise ValueError(f"per_folder={self.per_folder}: must be 1 or more")
        list_combinations(self.split, self.directions)  # knows what these two may be

    @property
    def num_frames(self) -> int:
        return round(self.seconds * self.fps)

    def paths(self, index: int) -> tuple[Path, Path]:
        """Video and caption, relative to OUT."""
        stem = Path(f"{index // self.per_folder:03d}") / f"{index:06d}"
        return stem.with_suffix(".mp4"), stem.with_suffix(".txt")


def make_videos(
    out: Path,
    *,
    count: int,
    seed: int = 0,
    width: int = 96,
    height: int = 64,
    fps: int = 15,
    seconds: float = 2.0,
    split: str = "all",
    directions: int = 4,
    crf: int = 18,
    per_folder: int = 1000,
    workers: int = 1,
    show_progress: bool = True,
) -> VideoSet:
    """Write `count` videos and their captions under `out`; files that are already there are kept.

    split, directions: see `shapes.list_combinations`. A video has round(seconds * fps) frames and
    shows `shapes.scene_of(seed, index)`, so a larger count extends a set. crf: x264's quality, 1
    (best) to 51. per_folder: videos a sub-folder. workers > 1 starts processes (spawned, so a
    script that calls this needs its `if __name__ == "__main__"` guard).

    Raises ValueError for a bad argument, or when `out` has videos made with other arguments,
    before anything is written.
    """
    settings = Settings(
        seed=seed,
        width=width,
        height=height,
        fps=fps,
        seconds=float(seconds),
        split=split,
        directions=directions,
        crf=crf,
        per_folder=per_folder,
    )
    for field, value in (("count", count), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{field}={value}: must be 1 or more")
    missing = [
        index
        for index in range(count)
        if not all((out / path).is_file() for path in settings.paths(index))
    ]
    _validate_folder(out, settings, is_empty=len(missing) == count)
    content = json.dumps(asdict(settings), indent=2) + "\n"
    _write_file(out / SETTINGS_NAME, lambda part: part.write_text(content, encoding="utf-8"))
    save = functools.partial(_save_video, out=out, settings=settings)
    _run(save, missing, workers=workers, show_progress=show_progress)
    return VideoSet(folder=out, num_videos=count, num_made=len(missing))


def encode_video(path: Path, frames: np.ndarray, *, fps: int, crf: int = 18) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as an H.264 mp4; H and W are even."""
    height, width = frames.shape[1:3]
    # faststart moves the index to the front, for which the muxer opens the file a second time.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # x264's AVX-512 code gives other bytes each time (seen on a Sapphire Rapids).
        stream.options = {
            "crf": str(crf), "preset": "fast", "threads": "1", "x264-params": "asm=avx2"
        }  # fmt: skip
        # Without these tags a player guesses the matrix, and at this size it guesses BT.601.
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _validate_folder(out: Path, settings: Settings, *, is_empty: bool) -> None:
    """Names are numbers alone, so a folder made otherwise would be mixed up with this one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write into")
    made_with = out / SETTINGS_NAME
    if not made_with.is_file():
        if not is_empty:
            raise ValueError(f"{out} has videos but no {SETTINGS_NAME}; give another folder")
        return
    try:
        before = dict(json.loads(made_with.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{made_with}: not valid ({error}); give another folder") from error
    for field, value in asdict(settings).items():
        if before.get(field) != value:
            raise ValueError(
                f"{field}={value}: {out} was made with {field}={before.get(field)}; "
                "give the same value or another folder"
            )


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, then rename: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def _save_video(index: int, *, out: Path, settings: Settings) -> None:
    scene = scene_of(settings.seed, index, split=settings.split, directions=settings.directions)
    video, caption = (out / path for path in settings.paths(index))
    if not caption.is_file():  # first, so that no video is ever without
        _write_file(caption, lambda part: part.write_text(scene.caption, encoding="utf-8"))
    if not video.is_file():
        frames = render_scene(
            scene,
            width=settings.width,
            height=settings.height,
            num_frames=settings.num_frames,
        )
        encode = functools.partial(encode_video, frames=frames, fps=settings.fps, crf=settings.crf)
        _write_file(video, encode)


def _run(
    save: Callable[[int], None], indices: list[int], *, workers: int, show_progress: bool
) -> None:
    """Call `save` on each index, in this process or in `workers` others."""
    with tqdm(total=len(indices), desc="videos", unit="video", disable=not show_progress) as bar:
        if workers == 1 or not indices:
            for index in indices:
                save(index)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for _ in pool.map(save, indices, chunksize=16):
                bar.update()


def _build_parser() -> argparse.ArgumentParser:
    """The command line; options that are not given keep `make_videos`'s defaults, but workers."""
    parser = argparse.ArgumentParser(
        prog="python -m data.make_videos",
        description="Make videos of moving shapes with captions, the same for the same arguments.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into")
    add("--count", type=int, required=True, help="number of videos")
    add("--seed", type=int, help="default 0")
    add("--width", type=int, help="pixels, even; default 96")
    add("--height", type=int, help="pixels, even; default 64")
    add("--fps", type=int, help="frames a second; default 15")
    add("--seconds", type=float, help="default 2.0")
    add("--split", help=f"{', '.join(SPLITS)}; default all")
    add("--directions", type=int, help="4, or 8 with the diagonals; default 4")
    add("--crf", type=int, help="x264's quality, 1 (best) to 51; default 18")
    add("--per-folder", type=int, help="videos a sub-folder; default 1000")
    add("--workers", type=int, default=2, help="processes; default 2")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: make the videos and write one line that sums it up."""
    parser = _build_parser()
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    try:
        made = make_videos(out, **options)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(
        f"{out}: {made.num_videos} videos ({made.num_made} made, "
        f"{made.num_videos - made.num_made} already there)\n"
    )


if __name__ == "__main__":
    main()
