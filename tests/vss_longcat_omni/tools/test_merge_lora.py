"""merge_lora.py: the merged folder is the adapter's model; a cut merge continues; errors."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vss_longcat_omni.model.test_adapter import edit_weights, make_base, write_adapter
from tests.vss_longcat_omni.model.test_language_model import relative
from vss_longcat_omni.model import saving
from vss_longcat_omni.model.adapter import LoraPair, read_adapter
from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.model.saving import save_config, save_weights
from vss_longcat_omni.options import hub
from vss_longcat_omni.tools import merge_lora
from vss_longcat_omni.tools.merge_lora import main, merge

if TYPE_CHECKING:
    from pathlib import Path

WEIGHT = "model.layers.1.self_attn.0.q_b_proj.weight"
PROJECTOR = "audio_projector."


def load(folder: Path) -> LongcatOmniForCausalLM:
    model = LongcatOmniForCausalLM(load_config(folder))
    load_weights(model, CheckpointReader(folder), show_progress=False)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(150, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter/, and base/ in the released layout: several shards, a tokenizer, a hidden file."""
    folder = tmp_path_factory.mktemp("made")
    model = make_base()
    save_config(model.config, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "MAX_SHARD_BYTES", 12_000)
        save_weights(model.state_dict(), folder / "base")
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / ".cache").mkdir()
    (folder / "base" / ".cache" / "lock").touch()
    write_adapter(folder / "adapter")
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "base", tmp_path / "base")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"q_b_proj": 2, r"layers\.0\.mlps\.\d\.up_proj": 6},
            "alpha_pattern": {"model.layers.1.self_attn.1.o_proj": 3, "q_b_proj": 5},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_merged_model_is_the_adapters(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = logits(write_adapter(tmp_path / "adapter", **changes))
    jobs = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert relative(logits(load(tmp_path / "out")), wanted) < 1e-5
    assert relative(logits(load(base)), wanted) > 0.1
    shards = [job for job in jobs if job.name.startswith("model-")]
    assert sum(bool(job.keys) for job in shards) > 3
    assert sum(not job.keys for job in shards) > 3


def test_all_else_is_as_it_was(base: Path, adapter: Path, tmp_path: Path) -> None:
    jobs = merge(base, adapter, tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert set(after) == set(before) - {".cache/lock"} | {"merged_from.json"}
    assert {"tokenizer.json", "audio/config.json", "model.safetensors.index.json"} <= set(after)
    for job in jobs:
        if not job.keys:
            assert after[job.name] == before[job.name]
            continue
        old, new = load_file(base / job.name), load_file(tmp_path / "out" / job.name)
        assert set(old) == set(new)
        assert {key for key in old if not torch.equal(old[key], new[key])} == set(job.keys)
    changed = {name for job in jobs for name in job.keys.values()}
    assert changed == set(read_adapter(adapter))


def test_the_sum_is_computed_in_float32_and_rounded_once(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.rmtree(base)
    model = make_base()
    save_config(model.config, base)
    save_weights(model.bfloat16().state_dict(), base)
    stored = model.state_dict()[WEIGHT]
    pair = read_adapter(adapter)[WEIGHT]
    assert isinstance(pair, LoraPair)
    exact = stored.double() + 2 * (pair.b.double() @ pair.a.double())
    for dtype in (None, torch.float32):
        out = tmp_path / str(dtype)
        jobs = merge(base, adapter, out, dtype=dtype)
        (job,) = (job for job in jobs if WEIGHT in job.keys)
        state = load_file(out / job.name)
        assert state[WEIGHT].dtype == (dtype or torch.bfloat16)
        last_digit = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 8)
        bound = last_digit / 2 if dtype is None else 0.0
        assert ((state[WEIGHT] - exact).abs() <= bound + 1e-6).all()
        before = load_file(base / job.name)
        assert all(state[key].dtype == before[key].dtype for key in before if key not in job.keys)
        size = (out / job.name).stat().st_size
        assert size - 10_000 < job.num_bytes < size


def test_modules_that_were_trained_whole_replace_their_part_files(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Released part files are pickles; those with trained tensors are written as safetensors."""
    for path in [*base.glob("audio/*.safetensors"), *base.glob("vision/*.safetensors")]:
        state = load_file(path)
        state["twice"] = state["twice too"] = torch.ones(2)  # one memory under two names
        torch.save(state, path.with_suffix(".pt"))
        path.unlink()
    model = make_base()
    chosen = (PROJECTOR, "speech_heads.")
    trained = {k: v + 1 for k, v in model.state_dict().items() if k.startswith(chosen)}
    save_file(trained, adapter / "trained_modules.safetensors")
    merge(base, adapter, tmp_path / "out")
    names = {f"{p.parent.name}/{p.name}" for p in (tmp_path / "out").glob("*/*") if p.is_file()}
    assert {"audio/audio_projector.safetensors", "audio/audio_output_layers.safetensors"} <= names
    assert {"audio/audio_encoder.pt", "vision/vision_projector.pt"} <= names
    assert not names & {"audio/audio_projector.pt", "audio/audio_output_layers.pt"}
    merged = load(tmp_path / "out").state_dict()
    assert len(trained) > 5
    for name, tensor in model.state_dict().items():
        if name.startswith(("audio_", "vision_", "speech_")):
            assert torch.equal(merged[name], trained.get(name, tensor)), name


def test_cut_off_it_continues(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, adapter, tmp_path / "whole")
    out, num_written = tmp_path / "out", 0

    def save_half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(merge_lora, "save_file", save_half)
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 2 <= len(kept) < len(list(base.glob("*.safetensors")))
    assert len(list(out.glob("*.partial"))) == 1
    merge(base, adapter, out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(tmp_path / "whole")
    (out / "merged_from.json").unlink()
    with pytest.raises(ValueError, match="is there and holds no merge"):
        merge(base, adapter, out)


def test_links_save_the_disk_and_never_write_into_the_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    before, out = contents(base), tmp_path / "out"
    jobs = merge(base, adapter, out, link=True)
    for job in jobs:
        is_kept_shard = not job.keys and job.name.startswith("model-")
        assert (out / job.name).samefile(base / job.name) == is_kept_shard, job.name
    linked = next(job.name for job in jobs if job.is_linked)
    (out / linked).rename(out / f"{linked}.partial")  # killed just before it got its name
    merge(base, adapter, out)
    assert not (out / linked).samefile(base / linked)
    assert contents(base) == before
    assert contents(out)[linked] == before[linked]


def test_a_full_disk_is_reported_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"the merged model needs 0\.\d\d MB at .*0\.10 MB are"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_folder_holds_one_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds a merge with another dtype \(merged_from"):
        merge(base, adapter, tmp_path / "out", dtype=torch.float16)
    write_adapter(adapter, lora_alpha=9)
    with pytest.raises(ValueError, match="holds a merge with another adapter_sha256"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("inside", ["", "merged"])
def test_the_base_is_never_the_place_to_write(base: Path, adapter: Path, inside: str) -> None:
    with pytest.raises(ValueError, match="lies in the base folder"):
        merge(base, adapter, base / inside)


LORA_A = "base_model.model.model.layers.0.mlps.1.up_proj.lora_A.weight"
OTHER_A = LORA_A.replace("0", "7")
OTHER = {OTHER_A: torch.zeros(4, 32), OTHER_A.replace("_A", "_B"): torch.zeros(48, 4)}


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("adapter_model", {LORA_A: torch.zeros(4, 31)},
         r"up_proj.weight has shape \(48, 32\), but the adapter's is \(48, 31\)"),
        ("adapter_model", OTHER, r"1 tensors .* first model\.layers\.7\.mlps\.1\.up_proj\.weight"),
        ("trained_modules", {"audio_projector.none": torch.zeros(2)}, "first audio_projector.none"),
        ("trained_modules", {"model.norm.weight": torch.zeros(2)}, r"norm.weight has shape \(32,"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_reported(
    base: Path, adapter: Path, tmp_path: Path, file: str, changed: dict, message: str
) -> None:
    edit_weights(adapter / f"{file}.safetensors", changed)
    with pytest.raises(ValueError, match=message):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_is_reported(base: Path, adapter: Path, tmp_path: Path) -> None:
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    shard = base / weight_map[WEIGHT]
    twice = base / "zz.safetensors"
    save_file({WEIGHT: torch.zeros(48, 16)}, twice)
    with pytest.raises(ValueError, match=rf"{WEIGHT} is in .*{shard.name} and again in .*zz"):
        merge(base, adapter, tmp_path / "out")
    twice.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"zz\.safetensors: not readable .* Download it again"):
        merge(base, adapter, tmp_path / "out")
    twice.unlink()
    edit_weights(shard, {WEIGHT: load_file(shard)[WEIGHT].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{WEIGHT} is stored as torch\.float8_e4m3fn"):
        merge(base, adapter, tmp_path / "out")
    for path in base.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"base: no \*\.safetensors file"):
        merge(base, adapter, tmp_path / "out")


def test_the_command(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = base.parent / "out"
    argv = ["--base", str(base), "--adapter", str(adapter), "--out", str(out)]
    main([*argv, "--dtype", "bfloat16", "--link"])
    assert capsys.readouterr().out.endswith("32 tensors changed\n")
    assert load(out).lm_head.weight.shape == (300, 32)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(SystemExit, match=r"error: .*no such file: .*adapter is no folder of an"):
        main(argv)
