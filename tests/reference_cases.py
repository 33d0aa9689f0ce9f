"""Holds our modules against the official ones' recorded outputs and gradients.

    python -m tests.reference_cases DIR

Every file of the reference naming in DIR (FAMILY_ANYTHING.cases.safetensors with its .weights, or
FAMILY_ANYTHING.json) is rebuilt from its own config, weights and inputs; every output and gradient
in it is compared. One line a case; exit status 1 on any mismatch or unreadable file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.llama_omni.support.speech_reference import compare_speech
from tests.longcat_video_fft.support.dit_reference import compare_dit
from tests.vss_longcat_omni.support.audio_reference import compare_audio, compare_fbank
from tests.vss_longcat_omni.support.streams_reference import (
    compare_embed,
    compare_interleave,
    compare_post,
    compare_rows,
)
from tests.vss_longcat_omni.support.vision_reference import (
    compare_geometry,
    compare_pixels,
    compare_vision,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Family name -> what yields (case, largest relative error) for one of its files.
FAMILIES: dict[str, Callable[[Path], Iterator[tuple[str, float]]]] = {
    "llama_omni_speech": compare_speech,
    "longcat_video_dit": compare_dit,
    "longcat_omni_vision": compare_vision,
    "longcat_omni_pixels": compare_pixels,
    "longcat_omni_geometry": compare_geometry,
    "longcat_omni_fbank": compare_fbank,
    "longcat_omni_audio": compare_audio,
    "longcat_omni_rows": compare_rows,
    "longcat_omni_interleave": compare_interleave,
    "longcat_omni_embed": compare_embed,
    "longcat_omni_post": compare_post,
}
TOLERANCE = 1e-5  # relative to the largest entry, float32
SUFFIXES = (".cases.safetensors", ".json")


@dataclass(frozen=True)
class Result:
    """One compared tensor; `problem` says why it could not be compared."""

    name: str
    error: float = float("inf")
    problem: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.problem and self.error <= TOLERANCE

    def __str__(self) -> str:
        verdict = "ok" if self.is_ok else "NOT OK"
        detail = self.problem or f"{self.error:.2e}"
        return f"{self.name:72s} {detail:>10s} {verdict}"


def check_file(path: Path) -> list[Result]:
    """Every case of one file; a file that cannot be read or is of no known family is a failure."""
    family = next((name for name in FAMILIES if path.name.startswith(name)), None)
    if family is None:
        return [Result(path.name, problem="no known family has this name")]
    results = []
    try:
        for case, error in FAMILIES[family](path):
            results.append(Result(f"{path.name}: {case}", error))
    except Exception as error:  # whatever is wrong with a file is its result
        results.append(Result(path.name, problem=f"cannot be checked: {error!r}"))
    return results or [Result(path.name, problem="holds no case")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare with recorded official results")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    files = sorted(p for p in folder.glob("*") if p.name.endswith(SUFFIXES))
    weights = sorted(folder.glob("*.weights.safetensors"))
    orphans = [w for w in weights if not cases_of(w).is_file()]
    results = []
    for path in [*files, *orphans]:
        found = (
            [Result(path.name, problem="has no .cases file beside it")]
            if path in orphans
            else check_file(path)
        )
        results += found
        sys.stdout.writelines(f"{result}\n" for result in found)
    if not results:
        sys.stdout.write(f"{folder}: no reference file found\n")
        return 1
    failed = sum(not result.is_ok for result in results)
    sys.stdout.write(f"{len(results) - failed} ok, {failed} not ok\n")
    return 1 if failed else 0


def cases_of(weights: Path) -> Path:
    return weights.with_name(weights.name.replace(".weights.", ".cases."))


if __name__ == "__main__":
    sys.exit(main())
