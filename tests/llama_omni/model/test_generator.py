"""Tests the speech generator: recorded official results, CTC values, states and frames."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from llama_omni.model.loss import count_infeasible, ctc_sum
from llama_omni.model.speech_generator import (
    SpeechGeneratorCTC,
    collapse_path,
    select_states,
    upsample_index,
)
from tests import reference_cases

REFERENCE = Path(__file__).parents[2] / "reference"
CASES = "llama_omni_speech_tiny.cases.safetensors"
CONFIG = SimpleNamespace(
    hidden_size=24, ctc_decoder_config="(2,32,4,48)", ctc_upsample_factor=3, unit_vocab_size=9,
    rms_norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip


@pytest.fixture
def generator() -> SpeechGeneratorCTC:
    return SpeechGeneratorCTC(CONFIG).eval()


def compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = reference_cases.main([str(folder)])
    return code, capsys.readouterr().out


def change_cases(folder: Path, change: Any) -> None:
    """Copies the reference files to `folder` with one case tensor changed."""
    shutil.copytree(REFERENCE, folder)
    with safe_open(REFERENCE / CASES, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / CASES, metadata=metadata)


# Reference vectors


def test_reference_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = compare(REFERENCE, capsys)
    assert code == 0, output
    with safe_open(REFERENCE / CASES, "pt") as file:
        outputs = set(file.keys()) - {"hidden", "labels", "units", "projector.in"}
    lines = [line for line in output.splitlines() if line.startswith(f"{CASES}: ")]
    assert {line.split()[1] for line in lines if line.endswith(" ok")} == outputs
    for path in filter(Path.is_file, REFERENCE.iterdir()):  # any ending stands for `_tiny`
        shutil.copy(path, tmp_path / path.name.replace("_tiny", "_other-7"))
    assert compare(tmp_path, capsys)[0] == 0


@pytest.mark.parametrize("name", ["loss", "grad_hidden", "projector.out", "predict.path"])
def test_one_changed_number_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].flatten()
        flat[flat.abs().argmax()] += 1 if name == "predict.path" else 1e-3 * flat.abs().max()

    change_cases(tmp_path / "changed", change)
    code, output = compare(tmp_path / "changed", capsys)
    assert code == 1
    (line,) = (line for line in output.splitlines() if "NOT OK" in line)
    assert f": {name} " in line


def test_a_tensor_that_nothing_compares_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_cases(tmp_path / "more", lambda tensors: tensors.update(extra=torch.ones(1)))
    code, output = compare(tmp_path / "more", capsys)
    assert code == 1
    assert "extra" in output


def test_unreadable_and_unknown_files_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, capsys)[0] == 1  # nothing there
    cut = tmp_path / "cut"
    shutil.copytree(REFERENCE, cut)
    (cut / CASES).write_bytes((REFERENCE / CASES).read_bytes()[:5000])
    orphan = tmp_path / "orphan"
    shutil.copytree(REFERENCE, orphan)
    (orphan / CASES).unlink()
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    shutil.copy(REFERENCE / CASES, unknown / "other_model.cases.safetensors")
    for folder, reason in ((cut, "cannot"), (orphan, "no .cases"), (unknown, "no known family")):
        code, output = compare(folder, capsys)
        assert code == 1
        assert reason in output
        assert "NOT OK" in output


# CTC


@pytest.mark.parametrize(("num_units", "expected"), [(554, 11.05), (700, 8.9), (1000, 7.0)])
def test_initial_loss_of_uniform_logits(num_units: int, expected: float) -> None:
    """An answer of 41 states and 1000 units: values known from a computation of the paper's size.

    Also by counting: every path has probability 1001^-frames, and there are
    C(frames + units, 2 units) paths of units without equal neighbors.
    """
    frames = 41 * 25
    units = torch.arange(num_units)[None] % 1000
    loss = ctc_sum(
        torch.zeros(1, frames, 1001), torch.tensor([frames]), units, torch.tensor([num_units]),
        blank=1000,
    )  # fmt: skip
    found = loss.item() / num_units
    assert found == pytest.approx(expected, abs=0.06)
    counted = frames * math.log(1001) - math.log(math.comb(frames + num_units, 2 * num_units))
    assert found == pytest.approx(counted / num_units, rel=1e-4)


def test_a_fresh_generator_begins_near_uniform(generator: SpeechGeneratorCTC) -> None:
    hidden, labels = torch.randn(1, 12, 24), torch.full((1, 12), 3)
    units = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    loss = generator(hidden, labels, units).item()
    frames = 33  # 11 states predict a label
    counted = frames * math.log(10) - math.log(math.comb(frames + 7, 14))
    assert loss == pytest.approx(counted / 7, rel=0.15)


def test_loss_by_hand(generator: SpeechGeneratorCTC) -> None:
    """Two states with three frames each, one unit: the sum over all its places and lengths."""
    hidden, labels = torch.randn(1, 4, 24), torch.tensor([[-100, -100, 4, 5]])
    states = hidden[:, 1:3]
    probs = generator.decode(states, torch.tensor([2]), torch.tensor([6]))[0].double().softmax(-1)
    total = 0.0
    for first in range(6):
        for last in range(first, 6):
            path = [9] * first + [7] * (last - first + 1) + [9] * (5 - last)
            total += math.prod(probs[i, unit].item() for i, unit in enumerate(path))
    found = generator(hidden, labels, torch.tensor([[7, -100]]))
    assert found.item() == pytest.approx(-math.log(total), rel=1e-5)


def test_global_count_divides(generator: SpeechGeneratorCTC) -> None:
    hidden, labels = torch.randn(2, 6, 24), torch.full((2, 6), 3)
    units = torch.tensor([[1, 2, 3], [4, -100, -100]])
    own = generator(hidden, labels, units)
    whole = generator(hidden, labels, units, num_units=8)
    assert whole.item() == pytest.approx(own.item() * 4 / 8, rel=1e-6)
    parts = [
        generator(hidden[i : i + 1], labels[i : i + 1], units[i : i + 1], num_units=torch.tensor(8))
        for i in range(2)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


def test_more_units_than_frames_are_stretched(generator: SpeechGeneratorCTC) -> None:
    hidden, labels = torch.randn(1, 3, 24), torch.tensor([[-100, 4, 5]])  # 2 states, 6 frames
    units = torch.arange(8)[None]
    logits, frames, lengths = generator.frame_logits(hidden, labels, units, shift=True)
    assert logits.shape == (1, 8, 10)
    assert (frames.item(), lengths.item()) == (8, 8)
    expected = -logits.log_softmax(-1)[0, range(8), range(8)].sum() / 8  # one path is left
    assert generator(hidden, labels, units).item() == pytest.approx(expected.item(), rel=1e-5)
    dropped = generator.frame_logits(hidden, labels, units, shift=True, stretch=False)
    assert dropped[0].shape == (1, 6, 10)
    assert ctc_sum(dropped[0], dropped[1], units, dropped[2], blank=9).item() == 0


def test_infeasible_answers_add_nothing_and_are_counted(generator: SpeechGeneratorCTC) -> None:
    """Two states give six frames: 8 units are stretched, 8 with equal neighbors are impossible."""
    hidden = torch.randn(3, 3, 24, requires_grad=True)
    labels = torch.tensor([[-100, 4, 5]] * 3)
    units = torch.tensor([[1, 2, 3] + [-100] * 5, list(range(8)), [1, 1, 2, 3, 4, 5, 6, 7]])
    loss = generator(hidden, labels, units)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[:2].abs().sum() > 0
    assert hidden.grad[2].abs().sum() == 0
    assert count_infeasible(labels, units, factor=3) == (2, 1)
    assert count_infeasible(labels, units, factor=3, stretch=False) == (2, 2)
    assert count_infeasible(labels, units, factor=5) == (0, 0)
    exact = torch.tensor([[1, 1, 2, 3, 4]])  # 5 units, one blank between: just fits 6 frames
    assert count_infeasible(labels[:1], exact, factor=3) == (0, 0)


def test_an_answer_loses_the_same_in_any_batch(generator: SpeechGeneratorCTC) -> None:
    hidden = torch.randn(2, 9, 24)
    labels = torch.full((2, 9), 3)
    labels[1, 4:] = -100
    labels[:, 0] = -100
    units = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, -100, -100, -100, -100]])
    whole = generator(hidden, labels, units, num_units=1).item()
    alone = [
        generator(hidden[:1], labels[:1], units[:1], num_units=1).item(),
        generator(hidden[1:, :4], labels[1:, :4], units[1:, :2], num_units=1).item(),
    ]
    assert whole == pytest.approx(sum(alone), rel=1e-5)


# States and frames


def test_shift_takes_the_states_that_predict() -> None:
    hidden = torch.arange(5.0)[None, :, None].repeat(2, 1, 1)
    labels = torch.tensor([[-100, -100, 8, 9, -100], [-100, 7, -100, -100, -100]])
    states, counts = select_states(hidden, labels, shift=True)
    assert states[..., 0].tolist() == [[1, 2], [0, 0]]
    assert counts.tolist() == [2, 1]
    released, _ = select_states(hidden, labels, shift=False)
    assert released[..., 0].tolist() == [[2, 3], [1, 0]]


def test_upsampling_is_the_floor_rule() -> None:
    for num_states, num_frames in [(3, 12), (4, 7), (5, 5), (41, 1025), (7, 60)]:
        index = upsample_index(torch.tensor([num_states]), torch.tensor([num_frames]))[0]
        exact = [frame * num_states // num_frames for frame in range(num_frames)]
        assert index.tolist() == exact


def test_decoding_in_chunks_equals_decoding_whole(generator: SpeechGeneratorCTC) -> None:
    states = torch.randn(1, 7, 24)
    whole = generator.decode(states, torch.tensor([7]), torch.tensor([21]))
    for sizes in ([1] * 7, [3, 4], [2, 1, 4]):
        cache = DynamicCache(config=generator.decoder_config)
        parts, start = [], 0
        for size in sizes:
            chunk = states[:, start : start + size]
            count = torch.tensor([size])
            parts.append(generator.decode(chunk, count, 3 * count, cache=cache))
            start += size
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_later_states_do_not_change_earlier_frames(generator: SpeechGeneratorCTC) -> None:
    states = torch.randn(1, 6, 24)
    whole = generator.decode(states, torch.tensor([6]), torch.tensor([18]))
    part = generator.decode(states[:, :4], torch.tensor([4]), torch.tensor([12]))
    torch.testing.assert_close(whole[:, :12], part, rtol=1e-4, atol=1e-5)


def test_collapse() -> None:
    assert collapse_path([9, 1, 1, 9, 1, 2, 2, 9], blank=9) == [1, 1, 2]
    assert collapse_path([1, 2], blank=9, previous=1) == [2]
    assert collapse_path([9, 9], blank=9) == []
