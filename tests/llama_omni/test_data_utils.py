"""Samples of both stages and batches: exact values, padding that changes nothing, fillers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from llama_omni.data_utils import SpeechInstructionDataset, collate
from llama_omni.dataset.batch import Batch
from llama_omni.dataset.prompt import pad_token_id, tokenize_conversation
from llama_omni.dataset.record_formats import Turn
from llama_omni.dataset.records import Record
from llama_omni.speech.audio import save_audio
from llama_omni.tools.make_model import build_tokenizer

X = -100  # IGNORE_INDEX
SPEECH = -200  # SPEECH_TOKEN_INDEX


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80)


def speech(seconds: float, *, seed: int = 0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * 16000), generator=noise)


def turn(
    path: Path,
    answer: str = "Four.",
    *,
    answer_path: Path | None = None,
    units: tuple[int, ...] | None = None,
) -> Turn:
    return Turn(path, "asked", answer, answer_path, units)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Two turns of 0.5 s and 0.9 s, then one of 0.33 s; answers with units, and one extracted."""
    lengths = {"a": 0.5, "b": 0.9, "c": 0.33}
    for seed, (name, seconds) in enumerate(lengths.items()):
        save_audio(tmp_path / f"{name}.wav", speech(seconds, seed=seed), sample_rate=16000)
    a, b, c = (tmp_path / f"{name}.wav" for name in lengths)
    source = tmp_path / "data.jsonl"
    return [
        Record(source, 1, (turn(a, "ab", units=(5, 6)), turn(b, "c", answer_path=a))),
        Record(source, 2, (turn(c, "longer answer", units=(7,)),)),
    ]


def make_dataset(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
    **options: object,
) -> SpeechInstructionDataset:
    return SpeechInstructionDataset(
        records,
        tokenizer,
        feature_extractor=extractor,
        **options,  # pyright: ignore[reportArgumentType]
    )


def test_stage_1_sample_is_a_record(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    dataset = make_dataset(records, tokenizer, extractor)
    assert len(dataset) == 2
    sample = dataset[0]
    # 0.5 s: 50 frames -> 25 -> 5 tokens; 0.9 s: 90 -> 45 -> 9 tokens.
    assert [mel.shape for mel in sample.mels] == [(80, 50), (80, 90)]
    expected = tokenize_conversation(records[0].turns, [5, 9], tokenizer, labeled="all")
    assert (sample.input_ids, sample.labels) == expected
    assert sample.tgt_units is None
    assert torch.equal(dataset[0].mels[0], sample.mels[0])  # nothing random


def test_stage_2_expands_turns_and_takes_the_last_ones_units(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    units = {str(records[0].turns[1].answer_speech_path): [8, 9, 8]}
    dataset = make_dataset(records, tokenizer, extractor, labeled="last", units=units)
    assert [dataset[i].tgt_units for i in range(len(dataset))] == [[5, 6], [8, 9, 8], [7]]
    first, second, third = (dataset[i] for i in range(3))
    turns = records[0].turns
    assert first.labels == tokenize_conversation(turns[:1], [5], tokenizer, labeled="last")[1]
    assert second.labels == tokenize_conversation(turns, [5, 9], tokenizer, labeled="last")[1]
    assert [len(sample.mels) for sample in (first, second, third)] == [1, 2, 1]
    with pytest.raises(IndexError):
        dataset[3]
    with pytest.raises(IndexError):
        dataset[-2]


def test_answers_without_units_stop_at_once(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no units .*a\.wav"):
        make_dataset(records, tokenizer, extractor, labeled="last", units={})
    with pytest.raises(ValueError, match="labeled='last'"):
        make_dataset(records, tokenizer, extractor, units={})


def test_unit_paths_are_found_when_resolved(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
    tmp_path: Path,
) -> None:
    detour = tmp_path / "x" / ".." / "a.wav"
    (tmp_path / "x").mkdir()
    record = Record(tmp_path, 1, (turn(tmp_path / "a.wav", answer_path=detour, units=(1,)),))
    units = {str((tmp_path / "a.wav").resolve()): [4]}
    dataset = make_dataset([record], tokenizer, extractor, labeled="last", units=units)
    assert dataset[0].tgt_units == [4]  # extracted ones before the record's own


def test_filler_has_nothing_to_learn(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    records = records[1:]
    dataset = make_dataset(records, tokenizer, extractor, labeled="last", units={})
    filler = dataset[-1]
    assert filler.input_ids == dataset[0].input_ids
    assert filler.labels == [X] * len(filler.input_ids)
    assert filler.tgt_units == []
    batch = collate([filler], pad_token_id=pad_token_id(tokenizer))
    assert (batch.num_label_tokens, batch.num_units) == (0, 0)
    assert batch.tgt_units is not None
    assert batch.tgt_units.shape == (1, 0)
    assert make_dataset(records, tokenizer, extractor)[-1].tgt_units is None


def test_batch_padding_is_exact(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    units = {str(records[0].turns[1].answer_speech_path): [8, 9, 8]}
    dataset = make_dataset(records, tokenizer, extractor, labeled="last", units=units)
    samples = [dataset[i] for i in (2, 1)]
    pad = pad_token_id(tokenizer)
    batch = collate(samples, pad_token_id=pad)
    short, long = (len(sample.input_ids) for sample in samples)
    assert batch.input_ids.tolist() == [
        samples[0].input_ids + [pad] * (long - short),
        samples[1].input_ids,
    ]
    assert batch.labels.tolist() == [samples[0].labels + [X] * (long - short), samples[1].labels]
    assert batch.tgt_units is not None
    assert batch.tgt_units.tolist() == [[7, X, X], [8, 9, 8]]
    assert batch.speech_lengths.tolist() == [34, 50, 90]  # clips of all turns, in order
    assert batch.speech.shape == (3, 80, 90)
    for clip, mel in zip(batch.speech, [m for s in samples for m in s.mels], strict=True):
        assert torch.equal(clip[:, : mel.shape[1]], mel)  # the frames that the item has alone
        assert not clip[:, mel.shape[1] :].any()
    assert batch.num_label_tokens == len("longer answer") + 1 + len("c") + 1
    assert batch.num_units == 4
    assert (batch.input_ids == SPEECH).sum() == 3 + 5 + 9


def test_even_frames_make_whispers_convolutions_blind_to_padding(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    dataset = make_dataset(records, tokenizer, extractor)
    batch = collate([dataset[1], dataset[0]], pad_token_id=pad_token_id(tokenizer))
    conv1 = torch.nn.Conv1d(80, 8, 3, padding=1)
    conv2 = torch.nn.Conv1d(8, 8, 3, stride=2, padding=1)

    def encode(mel: torch.Tensor) -> torch.Tensor:
        return conv2(torch.nn.functional.gelu(conv1(mel[None])))[0]

    alone = encode(dataset[1].mels[0])
    together = encode(batch.speech[0])
    torch.testing.assert_close(together[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-6)


def test_pad_audio_to_30s_gives_the_official_300_tokens(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    dataset = make_dataset(records, tokenizer, extractor, pad_audio_to_30s=True)
    sample = dataset[1]
    assert sample.input_ids.count(SPEECH) == 300
    batch = collate([sample], pad_token_id=0)
    assert batch.speech.shape == (1, 80, 3000)
    assert batch.speech_lengths.tolist() == [3000]


def test_item_errors_name_file_and_line(
    tokenizer: PreTrainedTokenizerFast, extractor: WhisperFeatureExtractor, tmp_path: Path
) -> None:
    save_audio(tmp_path / "long.wav", speech(31), sample_rate=16000)
    save_audio(tmp_path / "short.wav", speech(0.05), sample_rate=16000)
    for name, message in (
        ("long.wav", "long.wav: 31.0 s of speech"),
        ("short.wav", "short.wav: too short"),
        ("gone.wav", "gone.wav: no such audio file"),
    ):
        record = Record(tmp_path / "data.jsonl", 7, (turn(tmp_path / name),))
        with pytest.raises(ValueError, match=rf"data\.jsonl:7: .*{message}"):
            make_dataset([record], tokenizer, extractor)[0]
    save_audio(tmp_path / "ok.wav", speech(1), sample_rate=16000)
    record = Record(tmp_path / "data.jsonl", 7, (turn(tmp_path / "ok.wav"),))
    with pytest.raises(ValueError, match=r"data\.jsonl:7: \d+ tokens, over the limit of 50"):
        make_dataset([record], tokenizer, extractor, max_length=50)[0]


def test_batches_come_through_worker_processes(
    records: list[Record],
    tokenizer: PreTrainedTokenizerFast,
    extractor: WhisperFeatureExtractor,
) -> None:
    dataset = make_dataset(records, tokenizer, extractor)

    def load(num_workers: int) -> Batch:
        loader = DataLoader(
            dataset,
            batch_sampler=[[1, -1]],
            collate_fn=lambda samples: collate(samples, pad_token_id=0),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
        )
        return next(iter(loader))

    here, there = load(0).to("cpu"), load(1)
    assert isinstance(there, Batch)
    assert torch.equal(here.input_ids, there.input_ids)
    assert torch.equal(here.speech, there.speech)
    assert here.tgt_units is there.tgt_units is None
