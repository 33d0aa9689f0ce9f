"""Reads records: every format, every kind of bad record with its line, datasets as a whole."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from llama_omni.dataset.record_formats import Turn, parse_units
from llama_omni.dataset.records import Record, find_dataset_file, read_records

PREFIX = "data/multiturn_instruction/en/"
INFERENCE_VALUE = "<speech>\nPlease directly answer the questions in the user's speech."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with q1.wav, q2.wav (questions) and a1.wav, a2.wav (answers) under wav/."""
    tmp_path = tmp_path.resolve()
    (tmp_path / "wav").mkdir()
    for name in ("q1", "q2", "a1", "a2"):
        soundfile.write(tmp_path / f"wav/{name}.wav", np.full(1600, 0.1), 16000)
    return tmp_path


def plain(**changes: object) -> dict[str, object]:
    """A record of the source document's format; a value of None takes the key out."""
    record: dict[str, object] = {
        "speech_instruction_path": "wav/q1.wav",
        "text_instruction": "what is two plus two",
        "text_response": "It is four.",
        "speech_response_path": "wav/a1.wav",
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not None}


def released(*units: str | None) -> list[dict[str, object]]:
    """Turns as in InstructS2S-200K, one pair for each of `units`."""
    turns: list[dict[str, object]] = []
    for i, unit in enumerate(units, 1):
        question = {"from": "human", "speech": f"{PREFIX}wav/q{i}.wav", "text": f"Q{i}?"}
        answer = {"from": "gpt", "speech": f"{PREFIX}wav/a{i}.wav", "text": f"A{i}."}
        turns += [{**question, "unit": None}, {**answer, "unit": unit}]
    return turns


def write(root: Path, *items: object, name: str = "data.jsonl") -> Path:
    lines = (item if isinstance(item, str) else json.dumps(item) for item in items)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / name


def only_turns(path: Path, **options: object) -> tuple[Turn, ...]:
    records, bad = read_records(path, **options)  # pyright: ignore[reportArgumentType]
    assert bad == []
    assert len(records) == 1
    return records[0].turns


def reason(path: Path, **options: object) -> str:
    records, bad = read_records(path, **options)  # pyright: ignore[reportArgumentType]
    assert records == []
    assert len(bad) == 1
    return bad[0].reason


# Formats.


def test_source_document_jsonl(root: Path) -> None:
    path = write(root, plain(), "", plain(speech_response_path=None))
    records, bad = read_records(path)
    first = Turn(
        root / "wav/q1.wav", "what is two plus two", "It is four.", root / "wav/a1.wav", None
    )
    second = Turn(root / "wav/q1.wav", "what is two plus two", "It is four.", None, None)
    assert records == [Record(path, 1, (first,)), Record(path, 3, (second,))]  # line 2 is blank
    assert bad == []


def test_absolute_paths_and_byte_order_mark(root: Path) -> None:
    path = root / "data.jsonl"
    item = plain(speech_instruction_path=str(root / "wav/q2.wav"))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(item).encode())
    assert only_turns(path)[0].speech_path == root / "wav/q2.wav"


def test_released_multi_turn(root: Path) -> None:
    item = {"id": "x", "conversation": released("<1><2>", "3 4 5")}
    path = write(root, json.dumps([item, item], indent=1), name="instruct_en.json")
    records, bad = read_records(path, needs_units=True)
    turns = (
        Turn(root / "wav/q1.wav", "Q1?", "A1.", root / "wav/a1.wav", (1, 2)),
        Turn(root / "wav/q2.wav", "Q2?", "A2.", root / "wav/a2.wav", (3, 4, 5)),
    )
    assert records == [Record(path, 1, turns), Record(path, 2, turns)]  # item numbers
    assert bad == []


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("indent", [None, 1])
def test_bare_alternating_list(root: Path, name: str, indent: int | None) -> None:
    path = write(root, json.dumps(released(None), indent=indent), name=name)
    if name == "data.jsonl" and indent is None:
        path = write(root, json.dumps(released(None)), json.dumps(released(None)), name=name)
        assert len(read_records(path)[0]) == 2
        return
    assert [turn.answer for turn in only_turns(path)] == ["A1."]


def test_list_of_bare_lists(root: Path) -> None:
    path = write(root, [released(None, None), released(None)], name="data.json")
    assert [len(record.turns) for record in read_records(path)[0]] == [2, 1]


@pytest.mark.parametrize("answerer", ["gpt", "assistant"])
@pytest.mark.parametrize("units", ["849 761", "<849><761>", [849, 761]])
def test_official_conversations(root: Path, answerer: str, units: object) -> None:
    item = {
        "id": "helpful_base_1",
        "speech": "wav/q1.wav",
        "conversations": [
            {"from": "human", "value": INFERENCE_VALUE},
            {"from": answerer, "value": "It is four."},
        ],
        "tgt_units": units,
    }
    turn = Turn(root / "wav/q1.wav", "", "It is four.", None, (849, 761))
    assert only_turns(write(root, [item], name="data.json"), needs_units=True) == (turn,)


def test_prediction_units_with_and_without_question_file(root: Path) -> None:
    answer = {"question_id": "sft_1", "prediction": "Four.", "prediction_units": "7 8"}
    turn = Turn(root / "wav/q1.wav", "", "Four.", None, (7, 8))
    path = write(root, {**answer, "speech": "wav/q1.wav"}, name="answer.jsonl")
    assert only_turns(path, needs_units=True) == (turn,)
    write(root, answer, name="answer.jsonl")
    assert "question.json" in reason(path)
    write(root, [{"id": "sft_1", "speech": "wav/q1.wav"}], name="question.json")
    assert only_turns(root, needs_units=True) == (turn,)  # the folder's answers are taken


def test_formats_may_be_mixed_and_json_suffix_may_hold_lines(root: Path) -> None:
    path = write(root, plain(), {"conversation": released(None)}, name="data.json")
    assert [record.line for record in read_records(path)[0]] == [1, 2]


def test_parse_units() -> None:
    assert parse_units("849 761") == [849, 761]
    assert parse_units("<849><761>\n") == [849, 761]
    assert parse_units([849, 761]) == [849, 761]
    assert parse_units("") == []
    assert parse_units("99999 0007") == [99999, 7]
    for wrong in ("-1", "1,2", "<a>", "1.0", [1.5], [True], [-1], 5, {"a": 1}):
        with pytest.raises(ValueError, match="unit"):
            parse_units(wrong)  # pyright: ignore[reportArgumentType]


# Units of another vocabulary.


def test_cosyvoice_units_are_dropped_where_speech_allows_extraction(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = {"conversation": released("<2957><4299>", "<3><4>")}
    path = write(root, item, item)
    with caplog.at_level(logging.WARNING):
        records, bad = read_records(path, needs_units=True)
    assert bad == []
    assert [turn.tgt_units for turn in records[0].turns] == [None, (3, 4)]
    assert len(caplog.records) == 1  # once for the file, with the count
    assert "2 x units outside unit_vocab_size=1000" in caplog.text
    assert only_turns(write(root, item), unit_vocab_size=6561)[0].tgt_units == (2957, 4299)


def test_units_outside_without_speech_are_bad_in_stage_2_only(root: Path) -> None:
    path = write(root, plain(speech_response_path=None, tgt_units="5 1000"))
    assert "units up to 1000, outside unit_vocab_size=1000" in reason(path, needs_units=True)
    assert "units up to 1000" in reason(path, needs_units=None)
    assert only_turns(path)[0].tgt_units is None
    assert only_turns(path, needs_units=True, unit_vocab_size=1001)[0].tgt_units == (5, 1000)


# Bad records.


def spoken(*roles: str) -> dict[str, object]:
    turns = [{"from": role, "speech": "wav/q1.wav", "text": "t"} for role in roles]
    return {"conversation": turns}


BAD: list[tuple[object, str]] = [
    ('{"speech_instruction_path": ', "not valid JSON"),
    ('"\\ud8', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (5, "expected an object or a list of turns, got int"),
    ({}, "no known format .*found an empty object"),
    ({"conversatoin": []}, "is 'conversatoin' meant to be 'conversation'"),
    (plain(text_response=None), "no 'text_response' in"),
    (plain(text_response=None, text_respnse="x"), "no 'text_response': is 'text_respnse' meant"),
    (plain(speech_instruction_path=None), "no 'speech_instruction_path'"),
    (plain(text_response=" \n"), "'text_response' is empty"),
    (plain(text_instruction=""), "'text_instruction' is empty"),
    (plain(text_response=7), "'text_response' must be a text, got int"),
    (plain(text_response="a\ud800"), "half of a surrogate pair"),
    (plain(speech_instruction_path="wav/no.wav"), "missing audio file .*wav/no.wav"),
    (plain(speech_instruction_path="wav"), "missing audio file"),
    (plain(speech_instruction_path="a\0b"), "missing audio file"),
    (plain(tgt_units="1 x"), "unit 'x' is not a number"),
    ({"conversation": []}, "not an empty one"),
    ({"conversation": "hi"}, "a conversation is a list"),
    ({"conversation": ["hi", "ho"]}, "turn 1 is not an object"),
    (spoken("human"), "1 turns: the last question has no answer"),
    (spoken("human", "gpt", "human"), "3 turns: the last question has no answer"),
    (spoken("gpt", "human"), "turn 1 is from 'gpt'"),
    (spoken("human", "human"), "turn 2 is from 'human'"),
    (spoken("human", "robot"), "turn 2 is from 'robot'"),
    ({**spoken("human", "gpt", "human", "gpt"), "tgt_units": "1"}, "in each turn"),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
     "no 'speech'"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "expected"), BAD, ids=range(len(BAD)))
def test_bad_record_has_its_line_and_reason(root: Path, item: object, expected: str) -> None:
    path = write(root, plain(), "", item, plain())
    records, bad = read_records(path)
    assert [record.line for record in records] == [1, 4]
    assert [(b.source, b.line, b.is_warning) for b in bad] == [(path, 3, False)]
    assert re.search(expected, bad[0].reason), bad[0].reason
    assert str(bad[0]).startswith(f"{path}:3: ")


def test_line_that_is_not_utf8(root: Path) -> None:
    path = write(root, plain(), plain())
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    assert [(b.line, b.reason[:14]) for b in read_records(path)[1]] == [(3, "not valid JSON")]


def test_stage_2_needs_units_or_answer_speech(root: Path) -> None:
    path = write(root, plain(speech_response_path=None))
    assert "no units and no answer speech" in reason(path, needs_units=True)
    path = write(root, plain(speech_response_path="wav/gone.wav"))
    assert "missing audio file" in reason(path, needs_units=True)
    assert len(read_records(path)[0]) == 1  # stage 1 never opens it
    path = write(root, plain(speech_response_path="wav/gone.wav", tgt_units=[1]))
    assert only_turns(path, needs_units=True)[0].tgt_units == (1,)


# The dataset as a whole.


def test_folder_rules(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no"):
        find_dataset_file(root)
    first = write(root, plain(), name="b.jsonl")
    assert find_dataset_file(root) == first
    write(root, plain(), name="c.json")
    with pytest.raises(ValueError, match=r"b\.jsonl, c\.json"):
        find_dataset_file(root)
    assert find_dataset_file(write(root, plain()).parent) == root / "data.jsonl"


def test_missing_path_and_wrong_suffix(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_path=.*no/where"):
        read_records(root / "no/where")
    with pytest.raises(ValueError, match=r"is a \.jsonl or \.json file"):
        read_records(root / "wav/q1.wav")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data.jsonl", "", "the file is empty"),
        ("data.jsonl", " \n\n", "the file is empty"),
        ("data.json", "[]", "holds no records"),
        ("data.json", '[{"conversation": [}]', "not valid JSON: .*line 1 column"),
        ("data.json", "[\n {},\n oops]", "not valid JSON: .*line 3 column"),
        ("data.jsonl", "hello\nworld", "no line is JSON .*line 1"),
    ],
)
def test_unreadable_dataset_is_one_clear_error(
    root: Path, name: str, content: str, expected: str
) -> None:
    (root / name).write_text(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_records(root / name)
    assert name in str(caught.value)


def test_order_and_count_of_many_records(root: Path) -> None:
    """More files than one task of the existence check holds; every fifth one is missing."""
    names = ["wav/gone.wav" if i % 5 == 0 else "wav/q1.wav" for i in range(1, 1501)]
    path = write(root, *(plain(speech_instruction_path=name) for name in names))
    records, bad = read_records(path)
    assert [b.line for b in bad] == list(range(5, 1501, 5))
    assert [r.line for r in records] == [i for i in range(1, 1501) if i % 5]
