"""Tests the plan's lengths, sizes, text and errors; test_plan_memory.py tests its memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from llama_omni.dataset.lengths import SampleLength, read_lengths
from llama_omni.model.sizes import load_sizes
from llama_omni.options.config import load_config
from llama_omni.plan import __main__ as plan
from llama_omni.plan.__main__ import main
from llama_omni.plan.inputs import batch_size, expected_longest

FOLDER = Path(plan.__file__).parents[1]
CONFIGS = {stage: str(FOLDER / f"configs/stage{stage}_config.json") for stage in (1, 2)}


def config_of(stage: int, *options: str):
    return load_config([CONFIGS[stage], *options])


def test_expected_longest_against_draws() -> None:
    rng = random.Random(1)
    values = [rng.randint(1, 100) for _ in range(50)]
    drawn = [max(rng.choices(values, k=8)) for _ in range(20000)]
    assert expected_longest(values, 8) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    assert expected_longest(values, 1) == pytest.approx(sum(values) / 50)


def test_lengths_of_a_dataset(tmp_path: Path) -> None:
    for name, seconds in (("q1", 2.0), ("q2", 4.0), ("a", 10.0)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(int(16000 * seconds)), 16000)
    turn = {
        "speech_instruction_path": "q1.wav",
        "text_instruction": "what",
        "text_response": "x" * 45,
        "speech_response_path": "a.wav",
    }
    records = [turn, {**turn, "speech_instruction_path": "q2.wav", "tgt_units": "1 2 3"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in records))
    lengths = read_lengths(config_of(2), str(data))
    assert lengths.num_samples == 2
    # 45 letters make 10 tokens, and <|eot_id|>; 10 s of answer make 291 units.
    assert lengths.samples == (
        SampleLength((2.0,), 61 + 11, 11, 291),
        SampleLength((4.0,), 61 + 11, 11, 3),
    )
    size = batch_size(lengths, config_of(2), is_largest=True)
    assert (size.clips, size.mel_frames, size.tokens) == (8, 400, 61 + 11 + 40)
    assert size.unit_frames == 291


def test_sizes_from_folders(tmp_path: Path) -> None:
    from llama_omni.tools.make_model import main as make_models

    make_models([str(tmp_path)])
    config = config_of(
        1, "--model_name_or_path", str(tmp_path / "llama"),
        "--speech_encoder", str(tmp_path / "whisper"),
    )  # fmt: skip
    sizes = load_sizes(config)
    values = json.loads((tmp_path / "llama/config.json").read_text())
    assert (sizes.hidden_size, sizes.vocab_size) == (128, values["vocab_size"])
    assert (sizes.speech_encoder_hidden_size, sizes.mel_size) == (128, 80)
    assert str(tmp_path / "llama") in sizes.source
    assert sizes.download_bytes == 0


@pytest.mark.parametrize("stages", [(1,), (2,), (1, 2)])
def test_command_is_quick_and_light(stages: tuple[int, ...], tmp_path: Path) -> None:
    """0.3 s on an idle machine, since it loads nothing heavy."""
    code = "import sys; from llama_omni.plan.__main__ import main; code = main(sys.argv[1:]); " \
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"  # fmt: skip
    options = ["--output_dir", str(tmp_path / "not" / "yet")]
    result = subprocess.run(
        [sys.executable, "-c", code, *(CONFIGS[stage] for stage in stages), *options],
        capture_output=True, text=True, check=False, cwd=FOLDER.parent, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for stage in stages:
        assert f"Stage {stage} on h200x1: global batch 32 = 8 a device" in result.stdout
    for part in ("predicted peak", "Disk (GB)", "samples/s", "GPU-hours", "Settings that"):
        assert result.stdout.count(part) == len(stages)


def settings(text: str) -> list[tuple[float, float, str]]:
    """(GiB needed, hours, options) of the other settings of a report."""
    lines = text.split("Settings that")[1].splitlines()[1:]
    found = [line.split(maxsplit=2) for line in lines if line.strip() not in ("", "none")]
    return [(float(gib), float(hours), options) for gib, hours, options in found]


def test_what_does_not_fit_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status says so, with what fits: on a 24 GB card LoRA alone, or more cards."""
    assert main([CONFIGS[1], "--machine", "rtx3090x1"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    fitting = settings(text)
    assert all(gib <= 23.6 for gib, _, _ in fitting)
    assert fitting[0][2].startswith("--lora_enable true")
    assert all("--lora_enable true" in changes or "8 GPUs" in changes for _, _, changes in fitting)
    assert main([CONFIGS[1], "--machine", "h200x1"]) == 0
    assert "DOES NOT FIT" not in capsys.readouterr().out
    assert main(["--machine", "rtx4090x1", "--optimizer_precision", "8bit"]) == 1


def test_settings_that_use_the_machine_better(capsys: pytest.CaptureFixture[str]) -> None:
    """Larger batches, no recomputation, lower precision; each fits, and its plan is as listed."""
    assert main([CONFIGS[1], "--machine", "h200x1"]) == 0
    text = capsys.readouterr().out
    hours = float(text.split(" steps: ")[1].split(" h")[0])
    better = settings(text)
    assert "--per_device_train_batch_size 32" in better[0][2]
    assert any("bf16_stochastic --gradient_checkpointing false" in line for _, _, line in better)
    assert [hours, *(h for _, h, _ in better)] == sorted({hours, *(h for _, h, _ in better)})[::-1]
    for gib, faster, changes in better:
        assert main([CONFIGS[1], "--machine", "h200x1", *changes.split()]) == 0
        text = capsys.readouterr().out
        assert float(text.split("  needed ")[1].split()[0]) == pytest.approx(gib, abs=0.06)
        assert f" {faster:.1f} h, " in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([CONFIGS[1], "--machine", "h20x1"], "Did you mean 'h200x1'"),
        ([CONFIGS[1], "--machine", "rtx3091x2"], "Did you mean 'rtx3090x2'"),
        ([CONFIGS[1], "--machine", "h200"], "Did you mean 'h200x1'"),
        ([CONFIGS[1], "--machine"], "--machine: expected one argument"),
        ([CONFIGS[1], "--model_name_or_path", "meta-llama/Llama-3.1-8b"], "Llama-3.1-8B'"),
        ([CONFIGS[1], "--learning_rat", "1"], "Did you mean 'learning_rate'"),
        ([CONFIGS[1], "--optimizer_precision", "bf16"], "is unsupported"),
        ([CONFIGS[1], "--machine", "h200x3"], "global_batch_size=32 is not a multiple"),
        ([CONFIGS[1], "--data", "not/there.jsonl"], "not/there.jsonl"),
        (["configs/none.json"], "no such config file"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_without_a_config_both_shipped_stages_are_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--machine", "h200x1"]) == 0
    output = capsys.readouterr().out
    assert "Stage 1 on h200x1" in output
    assert "Stage 2 on h200x1" in output
