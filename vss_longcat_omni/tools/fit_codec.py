"""Fits the embedded speech codec to recordings, or encodes and decodes one, to listen to.

    python -m vss_longcat_omni.tools.fit_codec fit data/training --out cache/codec
    python -m vss_longcat_omni.tools.fit_codec round-trip IN.wav OUT.wav --codec cache/codec

Beside the data flow: `train_ds.py` fits it by itself where no other codec is named. How it is
fitted: speech/fit_codec.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vss_longcat_omni.media.audio import AUDIO_SUFFIXES, load_audio, save_audio
from vss_longcat_omni.speech.embedded_codec import NUM_CODEBOOKS, MelCodec
from vss_longcat_omni.speech.fit_codec import MAX_HOURS, fit_codec

if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER_STEMS = ("output", "out")  # what is fitted to in a folder of samples


def find_recordings(sources: Sequence[Path]) -> list[Path]:
    """Return files as they are, and a folder's answers (`output.wav`, `out.wav`), else its speech.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder holds no speech.
    """
    found: list[Path] = []
    for source in sources:
        if not source.is_dir():
            if not source.is_file():
                raise FileNotFoundError(f"{source}: no such file or folder")
            found.append(source)
            continue
        speech = sorted(p for p in source.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        if not speech:
            raise ValueError(f"{source}: holds no {', '.join(AUDIO_SUFFIXES)} file")
        found += [path for path in speech if path.stem in ANSWER_STEMS] or speech
    return found


def _fit(args: argparse.Namespace) -> str:
    codec = fit_codec(
        find_recordings(args.sources),
        args.out,
        codebook_sizes=args.books,
        max_hours=args.max_hours,
        seed=args.seed,
    )
    return f"{args.out}: codebooks of {', '.join(map(str, codec.codebook_sizes))}"


def _round_trip(args: argparse.Namespace) -> str:
    codec = MelCodec.load(args.codec)
    codes = codec.encode(load_audio(args.source))
    save_audio(args.out, codec.decode(codes), sample_rate=codec.sample_rate)
    return f"{args.out}: {len(codes)} frames of {NUM_CODEBOOKS} codes"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vss_longcat_omni.tools.fit_codec",
        description=(__doc__ or "").partition("\n")[0],
    )
    commands = parser.add_subparsers(required=True)
    fit = commands.add_parser("fit", help="fit a codec to recordings")
    fit.set_defaults(run=_fit)
    fit.add_argument("sources", nargs="+", type=Path, metavar="DIR_OR_WAV")
    fit.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    fit.add_argument(
        "--books", nargs=NUM_CODEBOOKS, type=int, help="entries; default: by the speech"
    )
    fit.add_argument("--max_hours", type=float, default=MAX_HOURS, help="speech to take")
    fit.add_argument("--seed", type=int, default=0)
    round_trip = commands.add_parser("round-trip", help="encode and decode a recording")
    round_trip.set_defaults(run=_round_trip)
    round_trip.add_argument("source", type=Path, metavar="IN")
    round_trip.add_argument("out", type=Path, metavar="OUT")
    round_trip.add_argument("--codec", required=True, type=Path, help="folder of the fitted codec")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        done = args.run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
