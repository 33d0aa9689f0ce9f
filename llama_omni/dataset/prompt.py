"""Builds the official prompt of LLaMA-Omni as token ids, with labels on the answers.

Place in the data flow: the text side of data_utils.py and generate.py.

Template `llama_3` of ictnlp/LLaMA-Omni (omni_speech/conversation.py). As there, the text on each
side of a speech placeholder is tokenized on its own. Unlike there, <|begin_of_text|> stands once
(the released preprocessing writes it and lets the tokenizer add another), and there may be several
turns. The transcript of a question is never in the prompt: the model has to listen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llama_omni.dataset.batch import IGNORE_INDEX, SPEECH_TOKEN_INDEX
from llama_omni.dataset.record_formats import INSTRUCTION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_omni.dataset.record_formats import Turn

EOT_TOKEN = "<|eot_id|>"
PAD_TOKEN = "<|finetune_right_pad_id|>"
SYSTEM_TEXT = (
    "You are a helpful language and speech assistant. You are able to understand the speech "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
PROMPT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT_TOKEN)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
SYSTEM_PROMPT = "<|begin_of_text|>" + HEADER.format("system") + SYSTEM_TEXT + EOT_TOKEN
BEFORE_SPEECH = HEADER.format("user")
AFTER_SPEECH = f"\n{INSTRUCTION}{EOT_TOKEN}" + HEADER.format("assistant")


def tokenize_conversation(
    turns: Sequence[Turn],
    num_speech_tokens: Sequence[int],
    tokenizer: Any,
    *,
    labeled: Literal["all", "last"],
) -> tuple[list[int], list[int]]:
    """Returns (input_ids, labels) of whole turns, each answer closed by <|eot_id|>.

    Turn i's speech is SPEECH_TOKEN_INDEX, `num_speech_tokens[i]` times. Labels are the answers'
    own ids, <|eot_id|> included, of all turns or of the last; IGNORE_INDEX everywhere else.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for index, (turn, num_speech) in enumerate(zip(turns, num_speech_tokens, strict=True)):
        prompt = _question_ids(num_speech, tokenizer, is_first=index == 0)
        answer = answer_ids(turn.answer, tokenizer)
        is_labeled = labeled == "all" or index == len(turns) - 1
        input_ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt)
        labels += answer if is_labeled else [IGNORE_INDEX] * len(answer)
    return input_ids, labels


def tokenize_prompt(
    history: Sequence[Turn], num_speech_tokens: Sequence[int], tokenizer: Any
) -> list[int]:
    """Returns the prompt ids up to the next answer: `history` turns, then one open question.

    `num_speech_tokens` has one entry more than `history`. The ids are a prefix of what
    `tokenize_conversation` gives for the same turns with the answer.
    """
    *earlier, last = num_speech_tokens
    input_ids, _ = tokenize_conversation(history, earlier, tokenizer, labeled="all")
    return input_ids + _question_ids(last, tokenizer, is_first=not history)


def answer_ids(answer: str, tokenizer: Any) -> list[int]:
    """Returns the ids of an answer and its <|eot_id|>; markup in the answer stays plain text."""
    text = answer.strip()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, special_token_id(EOT_TOKEN, tokenizer)]


def _question_ids(num_speech: int, tokenizer: Any, *, is_first: bool) -> list[int]:
    before = (SYSTEM_PROMPT if is_first else "") + BEFORE_SPEECH
    return [
        *tokenizer(before, add_special_tokens=False).input_ids,
        *[SPEECH_TOKEN_INDEX] * num_speech,
        *tokenizer(AFTER_SPEECH, add_special_tokens=False).input_ids,
    ]


def special_token_id(token: str, tokenizer: Any) -> int:
    """Returns the id of a special token; ValueError when the tokenizer has no such token."""
    token_id = _find_token(token, tokenizer)
    if token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no token {token!r}; LLaMA-Omni needs a "
            "Llama 3 tokenizer"
        )
    return token_id


def pad_token_id(tokenizer: Any) -> int:
    """Returns the id of <|finetune_right_pad_id|> (128004 in Llama 3.1), else of `pad_token`.

    Raises ValueError when there is neither, or when `pad_token` is a token that conversations
    hold: padding with <|eot_id|> hides it, and the model never learns to stop.
    """
    own = tokenizer.pad_token
    pad_id = _find_token(PAD_TOKEN, tokenizer)
    if pad_id is None and own is not None and own not in PROMPT_TOKENS:
        pad_id = _find_token(own, tokenizer)
    if pad_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no {PAD_TOKEN!r}, and its pad_token is "
            f"{own!r}: set pad_token in its tokenizer_config.json to a special token that text "
            f"never holds, such as '<|reserved_special_token_0|>', and not to {EOT_TOKEN!r}"
        )
    return pad_id


def _find_token(token: str, tokenizer: Any) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == tokenizer.unk_token_id else token_id
