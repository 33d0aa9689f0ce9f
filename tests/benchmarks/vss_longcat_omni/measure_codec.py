"""Measures how well speech is understood through the embedded codec; 5 minutes on a core.

    python -m tests.benchmarks.vss_longcat_omni.measure_codec OUT

espeak-ng speaks sentences in several voices; PocketSphinx, with a grammar of them, transcribes 60
that no codec was fitted to, in four voices: as recorded, through a codec fitted to the other
sentences in these voices, and through one fitted to all sentences in other voices.
"""

from __future__ import annotations

import argparse
import random
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.espeak import SAMPLE_RATE, synthesize
from data.shapes import COLORS, SHAPES
from vss_longcat_omni.media.audio import load_audio, resample, save_audio
from vss_longcat_omni.speech.closed_recognizer import load_grammar
from vss_longcat_omni.speech.fit_codec import fit_codec
from vss_longcat_omni.speech.recognizer import ROOM_NOISE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

VOICES = ("en-us+f1", "en-us", "en-us+f3", "en-us+m3")
OTHER_VOICES = (
    "en-us-nyc+f5", "en-us-nyc+m4", "en-gb", "en-gb+f2", "en-gb+m7", "en-gb-scotland+f4",
    "en-us+m1", "en-us+f2", "en-us+f4", "en-us+m2", "en-us+m5", "en-us+m7",
)  # fmt: skip
A_COLORS = [f"{'an' if color[0] in 'aeiou' else 'a'} {color}" for color in COLORS]
DIRECTIONS = ("to the left", "to the right", "up", "down")
GRAMMAR = """#JSGF V1.0; grammar sentences;
<color> = {colors};
<a_color> = {a_colors};
<shape> = {shapes};
<direction> = {directions};
public <sentence> = <a_color> <shape> moves <direction> | the color is <color>
    | it is a <shape> | it moves <direction>;"""
NUM_HELD_OUT = 60


def list_sentences() -> list[str]:
    moving = [
        f"{color} {shape} moves {direction}"
        for color, shape, direction in product(A_COLORS, SHAPES, DIRECTIONS)
    ]
    colors = [f"the color is {color}" for color in COLORS]
    shapes = [f"it is a {shape}" for shape in SHAPES]
    return moving + colors + shapes + [f"it moves {direction}" for direction in DIRECTIONS]


def record(folder: Path, voice: str, sentences: Sequence[str]) -> dict[str, Path]:
    """Record a file of each sentence, in tempos and pitches that the voice's name fixes."""
    rng = random.Random(voice)
    paths = {}
    for number, text in enumerate(sentences):
        speed, pitch = rng.randint(130, 180), rng.randint(40, 60)
        paths[text] = folder / voice / f"{number:03d}.wav"
        if not paths[text].exists():
            spoken = torch.from_numpy(synthesize(text, voice=voice, speed=speed, pitch=pitch))
            waveform = resample(spoken.float() / 32768, SAMPLE_RATE, 16000)
            save_audio(paths[text], waveform, sample_rate=16000)
    return paths


def measure(
    speech: dict[str, dict[str, Path]], held_out: Sequence[str], change: Callable[[Tensor], Tensor]
) -> Iterator[str]:
    """Yield for each noise how many sentences are recognized after `change`, by voice."""
    lists = {
        "colors": COLORS, "a_colors": A_COLORS, "shapes": SHAPES, "directions": DIRECTIONS
    }  # fmt: skip
    grammar = GRAMMAR.format_map({name: " | ".join(values) for name, values in lists.items()})
    for noise in (0.0, ROOM_NOISE):
        recognize = load_grammar(grammar, room_noise=noise)
        right = []
        for voice in VOICES:
            found = [recognize(change(load_audio(speech[voice][text]))) for text in held_out]
            right.append(sum(a == b for a, b in zip(held_out, found, strict=True)) / len(held_out))
        voices = " ".join(f"{value:.1%}" for value in right)
        yield f"noise {noise:g}: {sum(right) / len(right):.1%} ({voices})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the speech and the codecs")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    sentences = list_sentences()
    held_out = random.Random(0).sample(sentences, NUM_HELD_OUT)
    speech = {voice: record(out / "speech", voice, sentences) for voice in VOICES + OTHER_VOICES}
    same = [p for voice in VOICES for text, p in speech[voice].items() if text not in held_out]
    other = [p for voice in OTHER_VOICES for p in speech[voice].values()]
    for line in measure(speech, held_out, lambda waveform: waveform):
        sys.stdout.write(f"as recorded, {line}\n")
    for name, paths in (("same voices", same), ("other voices", other)):
        codec = fit_codec(paths, out / f"codec of {name}")
        for line in measure(speech, held_out, lambda wave, c=codec: c.decode(c.encode(wave))):
            sys.stdout.write(f"fitted to {name}, codebooks of {codec.codebook_sizes[0]}, {line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
