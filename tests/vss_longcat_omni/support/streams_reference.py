"""Rebuilds the token streams of `longcat_omni_{rows,interleave,post,embed}*` files.

All but `embed` are integers and text: a case is 0.0 off or infinitely far.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from tests.vss_longcat_omni.support.official_json import (
    character_tokenizer,
    check_keys,
    num_audio_tokens,
    part_as_json,
    read_codec,
    read_json,
    read_sampling,
    read_turn,
    read_voice,
    with_official_tags,
)
from vss_longcat_omni.dataset import template
from vss_longcat_omni.dataset.conversation import Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.dataset.interleave import AUDIO_TOKEN_SECONDS, plan_interleaved
from vss_longcat_omni.dataset.special_tokens import CodecIds, SpecialTokens, read_special_tokens
from vss_longcat_omni.inference.answer import clean_text, decode_text, undo_delay
from vss_longcat_omni.media.frame_sampling import FrameSample, sample_interleaved, sample_video
from vss_longcat_omni.model.fusion import AudioEmbeddings, merge_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from vss_longcat_omni.dataset.template import Streams

AUDIO_LENGTH = "frames=(n-400)//160+1, tokens=(frames+7)//8"


def compare_rows(path: Path) -> Iterator[tuple[str, float]]:
    """Answers as frames, whole conversations, and what becomes of a text that is too long."""
    data = read_json(path, "tokenizer role_ids conversions conversations too_long_fallback")
    config = data["config"]
    for key, wanted in {"use_text_instruction": True, "add_round_idx": False}.items():
        if config[key] != wanted:
            raise ValueError(
                f"config has {key}={config[key]}, which dataset/template.py does not write"
            )
    names = {"bos": "<longcat_s>", "eos": "</longcat_s>", "pad": "<longcat_pad>"}
    given = data["tokenizer"]
    check_keys(given, "rule special_ids bos eos pad")
    yield exact("tokenizer", {name: given[name] for name in names}, names)
    tokenizer = character_tokenizer(given["rule"], given["special_ids"])
    tokens = read_special_tokens(tokenizer, codec=read_codec(config))
    wanted_ids = [config[f"text_{name}"] for name in names]
    yield exact("text ids", [tokens.bos, tokens.eos, tokens.pad], wanted_ids)
    yield exact("audio_input_frame_sec", AUDIO_TOKEN_SECONDS, config["audio_input_frame_sec"])
    roles = {"pad": template.ROLE_NONE, **template.ROLES}
    yield exact("role_ids", {name: roles[name] for name in data["role_ids"]}, data["role_ids"])
    for case in data["conversions"]:
        yield from compare_conversion(case, tokenizer, tokens)
    for case in data["conversations"]:
        yield from compare_conversation(case, tokenizer, tokens)
    case = data["too_long_fallback"]
    turns = [read_turn(message) for message in case["messages"]]
    yield exact("too_long_fallback: error", is_error(turns, tokenizer, tokens), True)
    streams = template.build_streams(drop_speech(turns), tokenizer, tokens=tokens)
    mask = (streams.roles == template.ROLE_ASSISTANT).int()
    found = streams_as_json(streams, tokenizer, text="decoded") | {"assistant_mask": mask.tolist()}
    for key in sorted(set(case) - {"messages"}):
        ours = found[key] if key == "decoded" else [found[key]]
        yield exact(f"too_long_fallback.{key}", ours, case[key])


def drop_speech(turns: list[Turn]) -> list[Turn]:
    """Every spoken answer as plain text, which is what the official batch encoder makes, without a
    word to the user, of a conversation for which `build_streams` raises."""

    def as_text(item: Any) -> Any:
        is_voice = isinstance(item, VoiceItem)
        return TextItem("".join(s.text or "" for s in item.segments)) if is_voice else item

    return [
        Turn("assistant", tuple(map(as_text, turn.items)))
        if turn.role == "voice assistant"
        else turn
        for turn in turns
    ]


def compare_conversion(
    case: dict[str, Any], tokenizer: Any, tokens: SpecialTokens
) -> Iterator[tuple[str, float]]:
    """One voice answer without its prefix, or its error."""
    check_keys(case, "name text codec_ids text_pad_only tokenized_parts text_stream audio_streams "
               "rows error")  # fmt: skip
    item = read_voice(case["text"], case["codec_ids"])
    parts = [
        template.encode_segment(
            segment, tokenizer, tokens=tokens, is_last=segment is item.segments[-1]
        )
        for segment in item.segments
    ]
    yield exact(f"{case['name']}.tokenized_parts", parts, case["tokenized_parts"])
    if case["text_pad_only"]:
        item = VoiceItem(tuple(Segment(None, segment.codes) for segment in item.segments))
    turn = Turn("voice assistant", (item,))
    if "error" in case:
        yield exact(f"{case['name']}.error", is_error([turn], tokenizer, tokens), True)
        return
    streams = template.build_streams([turn], tokenizer, tokens=tokens)
    body = streams.roles == template.ROLE_ASSISTANT
    yield exact(f"{case['name']}.rows", int(body.sum()), case["rows"])
    yield exact(f"{case['name']}.text", streams.input_ids[body].tolist(), case["text_stream"])
    frames = streams.audio_ids[body].T.tolist()
    yield exact(f"{case['name']}.audio_streams", frames, case["audio_streams"])


def compare_conversation(
    case: dict[str, Any], tokenizer: Any, tokens: SpecialTokens
) -> Iterator[tuple[str, float]]:
    check_keys(case, "name messages options conversation input_ids role_ids multi_codec_ids")
    options = case["options"]
    check_keys(options, "is_voice_chat infer_insert_assistant")
    turns = [read_turn(message) for message in case["messages"]]
    if options.get("infer_insert_assistant"):
        speak = options.get("is_voice_chat", False)
        streams = template.build_prompt(turns, tokenizer, tokens=tokens, speak=speak)
    else:
        streams = template.build_streams(turns, tokenizer, tokens=tokens)
    for key, ours in streams_as_json(streams, tokenizer, text="conversation").items():
        yield exact(f"{case['name']}.{key}", ours, case[key])


def compare_interleave(path: Path) -> Iterator[tuple[str, float]]:
    """Frames and timestamps by both samplers, and plans of interleaved items."""
    data = read_json(path, "interleaved_sampling video_sampling plans")
    config = data["config"]
    if config["audio_length"] != AUDIO_LENGTH:
        raise ValueError(f"unknown rule of audio lengths: {config['audio_length']}")
    yield exact("audio_input_frame_sec", AUDIO_TOKEN_SECONDS, config["audio_input_frame_sec"])

    def by_interleaved(case: dict[str, Any]) -> FrameSample:
        return sample_interleaved(case["frames"], case["fps"], **read_sampling(case["meta"]))

    def by_video(case: dict[str, Any]) -> FrameSample:
        check_keys(case["meta"], "bound time_offset")
        limits = {"max_units": config["max_frame_num"], "tail_skip": config["frame_tail_skip"]}
        return sample_video(case["frames"], case["fps"], **limits, **case["meta"])

    for number, case in enumerate(data["interleaved_sampling"]):
        yield from compare_sampling(f"interleaved_sampling.{number}", case, by_interleaved)
    for number, case in enumerate(data["video_sampling"]):
        yield from compare_sampling(f"video_sampling.{number}", case, by_video)
    for case in data["plans"]:
        yield from compare_plan(case, by_interleaved(case), has_time=config["has_sec_sep"])


def compare_sampling(
    name: str, case: dict[str, Any], sample: Callable[[dict[str, Any]], FrameSample]
) -> Iterator[tuple[str, float]]:
    check_keys(case, "frames fps meta frame_indices timestamps duration strategy units error")
    if "error" in case:
        try:
            sample(case)
        except ValueError:
            yield f"{name}.error", 0.0
        else:
            yield f"{name}.error", float("inf")
        return
    found = sample(case)
    for key in ("frame_indices", "timestamps"):
        yield exact(f"{name}.{key}", list(getattr(found, key)), case[key])
    yield exact(f"{name}.units", len(found.timestamps), case["units"])
    yield exact(f"{name}.duration", found.duration, case["duration"])
    if "strategy" in case:
        yield exact(f"{name}.strategy", found.strategy, case["strategy"])


def compare_plan(
    case: dict[str, Any], sample: FrameSample, *, has_time: bool
) -> Iterator[tuple[str, float]]:
    inputs = "name frames fps meta audio_samples tokens_per_unit chunk_seconds"
    outputs = "frame_indices strategy segments total_tokens audio_tokens image_tokens"
    check_keys(case, f"{inputs} {outputs}")
    name = f"plans.{case['name']}"
    yield exact(f"{name}.frame_indices", list(sample.frame_indices), case["frame_indices"])
    yield exact(f"{name}.strategy", sample.strategy, case["strategy"])
    parts = plan_interleaved(
        sample.timestamps if has_time else [""] * len(sample.timestamps),
        case["tokens_per_unit"],
        num_audio_tokens(case["audio_samples"]),
        strategy=sample.strategy,
        units_per_second=case["meta"].get("sequential_sample_num_frame_per_sec", 1),
        chunk_seconds=case["chunk_seconds"],
    )
    if sample.strategy == "average":
        parts = with_official_tags(parts)
    yield exact(f"{name}.segments", [part_as_json(part) for part in parts], case["segments"])
    tokenizer = character_tokenizer()
    ids = template.encode_media(parts, tokenizer, tokens=read_special_tokens(tokenizer))
    yield exact(f"{name}.total_tokens", len(ids), case["total_tokens"])
    for key, kind in (("audio_tokens", "audio_pads"), ("image_tokens", "image_tokens")):
        count = sum(part.count for part in parts if part.kind == kind)
        yield exact(f"{name}.{key}", count, case[key])


def compare_post(path: Path) -> Iterator[tuple[str, float]]:
    """Rows back to codec frames and ids back to clean text."""
    data = read_json(path, "audio text text_from_ids")
    codec = read_codec(data["config"])
    tokenizer = character_tokenizer()
    for case in data["audio"]:
        check_keys(case, "name codec_ids rows unshifted decoder_semantic decoder_acoustic "
                   "round_trip_equal")  # fmt: skip
        name, frames = case["name"], undo_delay(torch.tensor(case["rows"]), codec=codec)
        yield exact(f"{name}.unshifted", frames.tolist(), case["unshifted"])
        codes = frames - codec.offset
        if "codec_ids" in case:
            given = [torch.tensor(segment) for segment in case["codec_ids"]]
            delayed = torch.cat([template.delay_codes(segment, codec=codec) for segment in given])
            yield exact(f"{name}.rows", delayed.tolist(), case["rows"])
            is_equal = torch.equal(codes, torch.cat(given))
            yield exact(f"{name}.round_trip_equal", is_equal, case["round_trip_equal"])
        if "decoder_semantic" in case:
            yield exact(f"{name}.semantic", codes[:, 0].tolist(), case["decoder_semantic"])
            yield exact(f"{name}.acoustic", codes[:, 1:].T.tolist(), case["decoder_acoustic"])
    for case in data["text"]:
        check_keys(case, "raw cleaned")
        yield exact(f"text {case['raw']!r}", clean_text(case["raw"]), case["cleaned"])
    for case in data["text_from_ids"]:
        check_keys(case, "ids text")
        yield exact(f"ids of {case['text']!r}", decode_text(case["ids"], tokenizer), case["text"])


def compare_embed(path: Path) -> Iterator[tuple[str, float]]:
    """Input embeddings with and without the encoders' features."""
    with safe_open(path, "pt") as file:
        cases: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    pad, num_streams = config["padding_idx"], config["audio_head_num"]
    tokens = SpecialTokens(
        pad=pad,
        audio_pad=config["audio_pad_token_id"],
        image_pad=config["image_pad_token_id"],
        codec=CodecIds(num_streams=num_streams, pad=pad),
    )
    tables = AudioEmbeddings(
        config["audio_vocab"], config["hidden_size"], num_streams=num_streams, pad=pad
    )
    named = {f"{k}.weight": v for k, v in cases.items() if k.startswith("audio_embeddings.")}
    tables.load_state_dict(named)
    input_ids, codecs = cases["input_ids"], cases["codecs"]
    text_embeds = torch.nn.functional.embedding(input_ids, cases["text_embedding"])
    features = {f"{kind}_features": cases[f"{source}_features"]
                for kind, source in (("audio", "audio"), ("image", "vision"))}  # fmt: skip
    for name, media in (("merged", features), ("merged_without_media", {})):
        ours = merge_embeddings(
            text_embeds, tables(codecs), input_ids, codecs, tokens=tokens, **media
        )[0]
        wanted = cases[name]
        yield name, ((ours - wanted).abs().max() / wanted.abs().max()).item()
    used = {"input_ids", "codecs", "text_embedding", "audio_features", "vision_features"}
    left = {k for k in cases if not k.startswith(("audio_embeddings.", "merged"))} - used
    left |= {k for k in cases if k.startswith("merged")} - {"merged", "merged_without_media"}
    if left:
        raise ValueError(f"tensors that nothing compares: {sorted(left)}")


def is_error(turns: list[Turn], tokenizer: Any, tokens: SpecialTokens) -> bool:
    try:
        template.build_streams(turns, tokenizer, tokens=tokens)
    except ValueError:
        return True
    return False


def streams_as_json(streams: Streams, tokenizer: Any, *, text: str) -> dict[str, Any]:
    """Under the files' keys; `text` names the key of the decoded text stream."""
    return {
        "input_ids": streams.input_ids.tolist(),
        "role_ids": streams.roles.tolist(),
        "multi_codec_ids": streams.audio_ids.tolist(),
        text: tokenizer.decode(streams.input_ids, clean_up_tokenization_spaces=False),
    }


def exact(name: str, ours: Any, official: Any) -> tuple[str, float]:
    """0.0 where equal; else infinity, and the first difference in the name."""
    if ours == official:
        return name, 0.0
    if isinstance(ours, list) and isinstance(official, list):
        pairs = enumerate(zip(ours, official, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(official)))
        return f"{name}[{first}] (lengths {len(ours)}, {len(official)})", float("inf")
    return f"{name}: {ours!r} for {official!r}", float("inf")
