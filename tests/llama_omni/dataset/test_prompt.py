"""Tests the official prompt as exact ids and labels, and what must not be in it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama_omni.dataset.prompt import pad_token_id, tokenize_conversation, tokenize_prompt
from llama_omni.dataset.record_formats import Turn
from llama_omni.tools.make_model import build_tokenizer

X = -100  # IGNORE_INDEX
SPEECH = -200  # SPEECH_TOKEN_INDEX
SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
INSTRUCTION = "\nPlease directly answer the questions in the user's speech.<|eot_id|>"
# The official prompt, character by character.
HEAD = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>{USER}"
    f"<speech>{INSTRUCTION}{ASSISTANT}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def turn(answer: str = "Four.", *, question: str = "zyxwv") -> Turn:
    return Turn(Path("q.wav"), question, answer, None, None)


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenizes as the official code: the text on each side of <speech> on its own."""
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<speech>")]
    return [token for part in parts for token in [SPEECH, *part]][1:]


def test_exact_ids_and_labels_of_one_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    input_ids, labels = tokenize_conversation([turn()], [1], tokenizer, labeled="all")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "Four."]
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert input_ids == [*ids(HEAD, tokenizer), *letters, eot]
    assert labels == [X] * (len(input_ids) - 6) + [*letters, eot]


def test_prompt_equals_official_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenising the answer apart from the header gives what the official joint pass gives."""
    for answer in ("Four.", " Four\n", "4", "'s", "\u00e9l\u00e8ve \u4f60\u597d", "a\n\nb"):
        found, _ = tokenize_conversation([turn(answer=answer)], [1], tokenizer, labeled="all")
        assert found == ids(f"{HEAD}{answer.strip()}<|eot_id|>", tokenizer)
    assert tokenizer.decode([i for i in found if i >= 0]).count("<|begin_of_text|>") == 1


@pytest.mark.parametrize(("labeled", "is_first_learned"), [("all", True), ("last", False)])
def test_exact_labels_of_two_turns(
    tokenizer: PreTrainedTokenizerFast, labeled: str, is_first_learned: bool
) -> None:
    turns = [turn(answer="ab"), turn(answer="c")]
    input_ids, labels = tokenize_conversation(
        turns,
        [3, 2],
        tokenizer,
        labeled=labeled,  # pyright: ignore[reportArgumentType]
    )
    a, b, c, eot = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "c", "<|eot_id|>"))
    head = ids(HEAD.replace("<speech>", "<speech>" * 3), tokenizer)
    middle = ids(f"{USER}<speech><speech>{INSTRUCTION}{ASSISTANT}", tokenizer)
    assert input_ids == [*head, a, b, eot, *middle, c, eot]  # history is kept
    first = [a, b, eot] if is_first_learned else [X, X, X]
    assert labels == [X] * len(head) + first + [X] * len(middle) + [c, eot]


def test_prompt_for_generation_is_a_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [turn(answer="ab"), turn(answer="c")]
    whole, labels = tokenize_conversation(turns, [3, 2], tokenizer, labeled="last")
    prompt = tokenize_prompt(turns[:1], [3, 2], tokenizer)
    assert whole[: len(prompt)] == prompt
    assert labels[len(prompt) - 1 : len(prompt) + 1] == [X, whole[len(prompt)]]
    assert tokenize_prompt([], [1], tokenizer) == ids(HEAD, tokenizer)


def test_transcript_never_enters_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [turn(question=question) for question in ("zyxwv", "other", "")]
    found = [tokenize_conversation([t], [2], tokenizer, labeled="all") for t in asked]
    assert found[0] == found[1] == found[2]
    assert "zyxwv" not in tokenizer.decode([i for i in found[0][0] if i >= 0])


def test_markup_in_an_answer_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (eot,) = ids("<|eot_id|>", tokenizer)
    text = "say <|eot_id|> or <|finetune_right_pad_id|> or <speech>"
    input_ids, labels = tokenize_conversation([turn(answer=text)], [1], tokenizer, labeled="all")
    answer = [label for label in labels if label != X]
    assert answer.count(eot) == 1
    assert answer[-1] == eot
    assert pad_token_id(tokenizer) not in input_ids
    assert input_ids.count(SPEECH) == 1
    assert tokenizer.decode(answer[:-1]) == text


def test_pad_token_is_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert pad_token_id(tokenizer) != tokenizer.convert_tokens_to_ids("<|eot_id|>")
    other = build_tokenizer()
    other.pad_token = "<|eot_id|>"  # what many scripts set; the named token is taken all the same
    assert pad_token_id(other) == pad_token_id(tokenizer)


@pytest.mark.parametrize("pad_token", [None, "<|eot_id|>", "<|begin_of_text|>"])
def test_no_pad_token_is_an_error_with_a_remedy(pad_token: str | None) -> None:
    old = without_pad(pad_token)
    with pytest.raises(ValueError, match=r"set pad_token in its tokenizer_config\.json"):
        pad_token_id(old)
    own = without_pad("<|end_of_text|>")
    assert pad_token_id(own) == own.convert_tokens_to_ids("<|end_of_text|>")


def without_pad(pad_token: str | None) -> PreTrainedTokenizerFast:
    """A Llama 3.0 kind of tokenizer, whose vocabulary lacks the padding token."""
    text = build_tokenizer().backend_tokenizer.to_str()
    renamed = Tokenizer.from_str(text.replace("<|finetune_right_pad_id|>", "<|reserved_0|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=renamed, bos_token="<|begin_of_text|>", pad_token=pad_token
    )


def test_tokenizer_of_another_family_is_refused() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="Llama 3 tokenizer"):
        tokenize_conversation([turn()], [1], plain, labeled="all")
