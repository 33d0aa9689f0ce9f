"""Holds the ids that steer the streams: special text tokens, reserved ids of the audio codes.

First step of the token streams: interleave.py, template.py, inference/answer.py and model/fusion.py
take the ids from here. Names and order of the tokens: constants.py and data/multimodal_tokenizer.py
of meituan-longcat/LongCat-Flash-Omni. Its tokenizer has no tokens of these names: they stand for
the reserved <mask_110> to <mask_119>, ids 134 to 143.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterable

IGNORE_INDEX = -100  # of a label: no target
BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<longcat_s>", "</longcat_s>", "<longcat_pad>"
PAUSE_TOKEN = "</pause>"
# Field of SpecialTokens -> official name; the n-th is <mask_(110 + n)> in the vocabulary.
EXTENDED_TOKENS = {
    "audio_begin": "<|audio|>",
    "audio_end": "<|/audio|>",
    "audio_pad": "<|audio_pad|>",
    "pause": PAUSE_TOKEN,
    "system_begin": "<begin-of-system>",
    "user_begin": "<begin-of-user>",
    "assistant_begin": "<begin-of-assistant>",
    "voice_assistant_begin": "<begin-of-voice-assistant>",
    "image_pad": "<|image_pad|>",
    "image": "<image>",
}
FIRST_MASK = 110
MASK_TOKENS = {  # <mask_110> -> <|audio|>
    f"<mask_{FIRST_MASK + n}>": name for n, name in enumerate(EXTENDED_TOKENS.values())
}
# The byte tokenizer's first 150 ids: its own four, then fillers, so that <mask_110> is 134.
NUM_RESERVED_IDS, FIRST_MASK_ID = 150, 24


@dataclass(frozen=True, kw_only=True)
class CodecIds:
    """Holds ids of an audio stream: three reserved ones matter, raw codes begin at `offset`."""

    num_streams: int = 4  # one semantic, then the acoustic ones
    offset: int = 32
    eos: int = 2  # closes the semantic stream
    pad: int = 3  # no code here


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Holds ids of the text stream; the defaults are the released ones."""

    bos: int = 1
    eos: int = 2
    pad: int = 3
    audio_begin: int = 134
    audio_end: int = 135
    audio_pad: int = 136  # its embedding gives way to an audio feature
    pause: int = 137  # ends a segment of the answer that another one follows
    system_begin: int = 138
    user_begin: int = 139
    assistant_begin: int = 140
    voice_assistant_begin: int = 141
    image_pad: int = 142  # its embedding gives way to an image feature
    image: int = 143
    codec: CodecIds = CodecIds()

    @property
    def reserved(self) -> frozenset[int]:
        """Return the text ids that no plain text may hold."""
        names = ("bos", "eos", "pad", *EXTENDED_TOKENS)
        return frozenset(getattr(self, name) for name in names)


def read_special_tokens(tokenizer: Any, *, codec: CodecIds | None = None) -> SpecialTokens:
    """Return the tokenizer's own ids (a transformers PreTrainedTokenizerBase).

    A token is looked for under its reserved name (<mask_110>), then under its official one.

    Raises:
        ValueError: a token is missing, or pad is another token too.
    """
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids["pad"] = tokenizer.pad_token_id
    for (field, name), mask in zip(EXTENDED_TOKENS.items(), MASK_TOKENS, strict=True):
        found = _find_token(mask, tokenizer)
        ids[field] = _find_token(name, tokenizer) if found is None else found
    missing = [field for field, token_id in ids.items() if token_id is None]
    if missing:
        named = ", ".join(_describe(field) for field in missing)
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} lacks {named}: LongCat-Flash-Omni needs its "
            "own tokenizer (tokenizer.json of the released folder), or that of "
            "special_tokens.build_byte_tokenizer for small models"
        )
    if len(set(ids.values())) < len(ids):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} gives two special tokens one id ({ids}): "
            f"set pad_token in its tokenizer_config.json to a token of its own, such as "
            f"{PAD_TOKEN!r}; a pad that is also eos would hide where an answer ends"
        )
    return SpecialTokens(**ids, codec=codec or CodecIds())


def name_mask_tokens(text: str) -> str:
    """Return decoded text with <mask_110> and its like under their official names."""
    for mask, name in MASK_TOKENS.items():
        text = text.replace(mask, name)
    return text


def build_byte_tokenizer(
    texts: Iterable[str] = (), *, vocab_size: int = NUM_RESERVED_IDS + 256
) -> PreTrainedTokenizerFast:
    """Build a real tokenizer for small models: 150 reserved ids, then one id a byte, then merges.

    Every special token has the id and the name that it has in the released vocabulary. Merges are
    learned from `texts` up to `vocab_size` ids; the default has none. A letter a token can be too
    many for its speech: an answer has one frame every 60 ms, some 16 a second.
    """
    fillers = [f"<reserved_{i}>" for i in range(4, FIRST_MASK_ID)]
    masks = [f"<mask_{i}>" for i in range(NUM_RESERVED_IDS - FIRST_MASK_ID)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, *fillers, *masks],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _find_token(token: str, tokenizer: Any) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == tokenizer.unk_token_id else token_id


def _describe(field: str) -> str:
    if field not in EXTENDED_TOKENS:
        return f"{field}_token"
    name = EXTENDED_TOKENS[field]
    mask = next(mask for mask, official in MASK_TOKENS.items() if official == name)
    return f"{name} ({mask})"
