"""What the JSON reference files hold, as our objects: tokenizer, turns, options, plans.

Used by `streams_reference.py`. Everything that is not understood raises ValueError, so that no
entry of a file passes unseen.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vss_longcat_omni.dataset.conversation import MediaItem, Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.dataset.interleave import Part, plan_interleaved
from vss_longcat_omni.dataset.special_tokens import (
    BOS_TOKEN,
    EOS_TOKEN,
    EXTENDED_TOKENS,
    PAD_TOKEN,
    CodecIds,
    SpecialTokens,
)

if TYPE_CHECKING:
    from pathlib import Path

CHARACTER_RULE = "one token per ASCII character, id = 200 + code point"
OFFICIAL_IDS = {"<unk>": 0, BOS_TOKEN: 1, EOS_TOKEN: 2, PAD_TOKEN: 3} | {
    name: getattr(SpecialTokens(), field) for field, name in EXTENDED_TOKENS.items()
}
PAUSE = "</pause>"
# Option of an official item -> argument of `sample_interleaved`.
SAMPLING = {
    "bound": "bound",
    "time_offset": "time_offset",
    "sequential_max_num_sample_frame": "max_units",
    "sequential_sample_num_frame_per_sec": "units_per_second",
    "frame_sample_strategy": "strategy",
}


def read_json(path: Path, keys: str) -> dict[str, Any]:
    data = json.loads(path.read_text())
    check_keys(data, f"config note {keys}")
    return data


def check_keys(entry: dict[str, Any], known: str) -> None:
    left = sorted(set(entry) - set(known.split()))
    if left:
        raise ValueError(f"entries that nothing compares: {left}")


def character_tokenizer(
    rule: str = CHARACTER_RULE, special_ids: dict[str, int] | None = None
) -> PreTrainedTokenizerFast:
    """The stand-in of the reference files: one token a character, special ids as given."""
    first = re.match(r"one token per ASCII character, id = (\d+) \+ code point", rule)
    if first is None:
        raise ValueError(f"unknown rule of the tokenizer: {rule!r}")
    special = special_ids or OFFICIAL_IDS
    characters = {chr(point): int(first[1]) + point for point in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=special | characters, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
    )


def read_codec(config: dict[str, Any]) -> CodecIds:
    return CodecIds(
        num_streams=config.get("audio_head_num", 4),
        offset=config["codec_offset"],
        eos=config["codec_eos"],
        pad=config["codec_pad"],
    )


def num_audio_tokens(samples: int) -> int:
    """The files' rule: frames of 400 samples every 160, 8 frames a token."""
    return max(0, ((samples - 400) // 160 + 1 + 7) // 8)


def read_turn(message: dict[str, Any]) -> Turn:
    check_keys(message, "role content")
    items = [item for content in message["content"] for item in read_items(content)]
    return Turn(message["role"], tuple(items))


def read_items(content: dict[str, Any]) -> list[TextItem | MediaItem | VoiceItem]:
    """One official item; a still image is pads and a newline."""
    kind, meta = content["type"], content.get("meta", {})
    check_keys(content, f"type meta {kind}")
    main = content[kind]
    if kind == "text":
        return [TextItem(main)]
    if kind == "audio":
        check_keys(main, "samples")
        count = num_audio_tokens(main["samples"])
        pads = (Part("audio_pads", count=count),) if count else ()
        return [MediaItem((Part("audio_begin"), *pads, Part("audio_end")))]
    if kind == "audio_codec":
        check_keys(meta, "codec_ids")
        return [read_voice(main, meta["codec_ids"])]
    if kind == "image":
        check_keys(meta, "image_token_num")
        pads = Part("image_tokens", count=meta["image_token_num"][0])
        return [MediaItem((pads,)), TextItem("\n")]
    if kind not in ("video", "multimodal_interleaved"):
        raise ValueError(f"unknown type of content: {kind!r}")
    check_keys(meta, "frame_secs image_token_num frame_sample_strategy "
               "sequential_sample_num_frame_per_sec")  # fmt: skip
    strategy = meta.get("frame_sample_strategy", "sequential")
    parts = plan_interleaved(
        meta["frame_secs"],
        meta["image_token_num"],
        num_audio_tokens(main["samples"]) if kind == "multimodal_interleaved" else 0,
        strategy=strategy,
        units_per_second=meta.get("sequential_sample_num_frame_per_sec", 1),
    )
    if kind == "multimodal_interleaved" and strategy == "average":
        parts = with_official_tags(parts)
    return [MediaItem(parts)]


def with_official_tags(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A plan of the strategy `average` with the tags that the official code writes: no closing one
    when there is one unit, and tags around no sound."""
    units = [number for number, part in enumerate(parts) if part.kind == "image_tokens"]
    if any(part.kind == "audio_pads" for part in parts):
        return tuple(p for p in parts if p.kind != "audio_end" or len(units) > 1)
    found: list[Part] = []
    for number, part in enumerate(parts):
        found.append(part)
        if number in units:
            found.append(Part("audio_begin" if number == units[0] else "audio_end"))
    return tuple(found)


def read_voice(text: str, codec_ids: list[list[list[int]]]) -> VoiceItem:
    texts = text.split(PAUSE)
    segments = [Segment(t, torch.tensor(c)) for t, c in zip(texts, codec_ids, strict=True)]
    return VoiceItem(tuple(segments))


def read_sampling(meta: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `sample_interleaved`.

    Official oddity: given frame indices are not used; they only make the strategy "average".
    """
    options = {k: v for k, v in meta.items() if k != "frame_indices" and v is not None}
    check_keys(options, " ".join(SAMPLING))
    arguments = {SAMPLING[key]: value for key, value in options.items()}
    has_indices = meta.get("frame_indices") is not None
    return arguments | ({"strategy": "average"} if has_indices else {})


def part_as_json(part: Part) -> list[Any]:
    """A run of pads has its length, a timestamp its text, a tag neither."""
    if part.kind == "timestamp":
        return [part.kind, part.text]
    return [part.kind, part.count] if part.kind in ("image_tokens", "audio_pads") else [part.kind]
