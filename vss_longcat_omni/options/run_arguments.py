"""Holds our own options, what is trained and on what, and checks them at once.

training_arguments.py adds Hugging Face's. Torch and transformers, which take seconds to import, are
not imported here: a mistake in these options is reported in the first second.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from vss_longcat_omni.options.lora_targets import LORA_TARGETS, translate_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

SamplingRule = Literal["multimodal_interleaved", "video", "plain_2fps"]
TUNINGS = ("lora", "full")
TRANSCRIPTS = ("file", "none")


@dataclass(frozen=True)
class LossWeights:
    """Has the defaults of Meituan's first pre-training stage (report 3.2.2: c, b and d).

    Attributes:
        text: of the text tokens, whose answers come with speech.
        audio: of the codes of all streams together.
        semantic: of the semantic codes once more.
    """

    text: float = 1.5
    audio: float = 0.25
    semantic: float = 0.1


@dataclass(kw_only=True)
class RunArguments:
    """Says what is trained, on what.

    Attributes:
        model_name_or_path: a folder, or a hub id (1.1 TB are downloaded, once a node).
        data_dir: holds training/ (or train/) and perhaps test/.
        cache_dir: prepared frames, features and codes; made once, used by every run.
        codec: folder of a speech codec. None: the embedded one, fitted to the answers and kept in
            cache_dir/codec.
        transcripts: "file": every answer has its output.txt, or a transcript of
            tools/transcribe.py in the cache. "none": the text stream is all pads, and the model
            learns to speak without a text to follow.
        tuning: "lora", or "full": everything, for small models.
        train_projectors, train_audio_heads: beside the adapters; trained_modules.safetensors
            holds them.
        frame_sampling: which frames of a video are taken (media/frame_sampling.py).
        use_audio_track: a video's own sound, where it has one, comes before the question.
        max_vision_tokens: of one sample, after pooling.
        max_tokens: of one micro-batch when packing.
        packing: join samples to micro-batches of up to max_tokens; else
            per_device_train_batch_size samples of like length.
        text_loss_weight, audio_loss_weight, semantic_loss_weight: see model/loss.py.
        system_prompt: text of a system turn before the question; empty: none.
        prepare_only: stop when frames, features and codes are in the cache.
        force: train although the plan says that it cannot fit.
    """

    model_name_or_path: str = "meituan-longcat/LongCat-Flash-Omni"
    data_dir: str = "data"
    cache_dir: str = "cache"
    codec: str | None = None
    transcripts: str = "file"
    tuning: str = "lora"
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    train_projectors: bool = False
    train_audio_heads: bool = False
    frame_sampling: str = "multimodal_interleaved"
    use_audio_track: bool = False
    max_vision_tokens: int = 28672
    max_tokens: int = 8192
    packing: bool = True
    text_loss_weight: float = 1.5
    audio_loss_weight: float = 0.25
    semantic_loss_weight: float = 0.1
    system_prompt: str = ""
    prepare_only: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _check_choice("tuning", self.tuning, TUNINGS)
        _check_choice("transcripts", self.transcripts, TRANSCRIPTS)
        _check_choice("frame_sampling", self.frame_sampling, get_args(SamplingRule))
        for name in ("lora_r", "lora_alpha", "max_tokens", "max_vision_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: give a share from 0 to below 1.")
        weights = (self.text_loss_weight, self.audio_loss_weight, self.semantic_loss_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"text_loss_weight, audio_loss_weight, semantic_loss_weight={weights}: give none "
                "below 0 and at least one above."
            )
        self.lora_target_modules = list(translate_targets(self.lora_target_modules))

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(self.text_loss_weight, self.audio_loss_weight, self.semantic_loss_weight)


def check_argv(argv: Sequence[str]) -> RunArguments | None:
    """Return our own options of the command line; None where it asks for --help. All others are
    read later.

    Raises:
        ValueError: a value that cannot be, a file that cannot be read.
    """
    if {"-h", "--help"} & set(argv):
        return None
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name, kind in get_type_hints(RunArguments).items():
        if kind is not bool:
            is_list = get_origin(kind) is list
            kind = kind if kind in (int, float) else str
            parser.add_argument(f"--{name}", type=kind, nargs="+" if is_list else None)
    parser.add_argument("--deepspeed")
    given = vars(parser.parse_known_args(expand_config(argv))[0])
    deepspeed = given.pop("deepspeed", "")
    if deepspeed and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        raise ValueError(f'deepspeed={deepspeed}: no such file; "" trains without DeepSpeed.')
    return RunArguments(**given)


def expand_config(argv: Sequence[str]) -> list[str]:
    """Replace `--config FILE` by the file's keys as flags, so that later flags win."""
    argv = list(argv)
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("--config: needs a JSON file.")
    values = read_json(Path(argv[at + 1]), name=f"--config {argv[at + 1]}")
    flags = [flag for key, value in values.items() for flag in _as_flag(key, value)]
    return flags + argv[:at] + argv[at + 2 :]


def add_max_frames(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Add --max_frames; its earlier name --max_rows is accepted with a line that says the new."""
    parser.add_argument("--max_frames", type=int, default=default, help="of an answer, 60 ms each")
    hidden: Any = {"dest": "max_frames", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--max_rows", type=int, action=_MaxRows, **hidden)


class _MaxRows(argparse.Action):
    def __call__(self, _: Any, namespace: argparse.Namespace, values: Any, *__: Any) -> None:
        sys.stderr.write("--max_rows is now --max_frames\n")
        namespace.max_frames = values


def read_json(path: Path, *, name: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError, beginning with `name`: there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: not readable as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: must be a JSON object.")
    return values


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}.")
