"""Checkpoints: bitwise resume on any number of processes, whole or absent, errors that say why."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.training.checkpoint import (
    Checkpointer,
    check_disk,
    checkpoint_step,
    compare,
    find_checkpoint,
    finished_checkpoints,
    load_checkpoint,
    read_trainer_state,
)
from tests.longcat_video_fft.support.small_engine import (
    SIZES,
    differing,
    make_engine,
    own_state,
    train_steps,
    whole_state,
)
from tests.longcat_video_fft.support.spawn import join_alone, spawn
from tests.longcat_video_fft.support.tiny import ROOT, launch_env

if TYPE_CHECKING:
    from pathlib import Path

OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit")
Usage = namedtuple("Usage", "total used free")


def make_checkpointer(engine: Any, folder: Path, keep_last: int | None = None) -> Checkpointer:
    return Checkpointer(engine, folder, keep_last=keep_last, identity=SIZES)


def resume_in_processes(folder: Path) -> None:
    """Checks that 6 steps = 3 + resume 3, and the state at step 3 for other numbers of
    processes."""
    for optimizer in OPTIMIZERS:
        output_dir = folder / optimizer
        options: dict[str, Any] = {"optimizer": optimizer, "ema_decay": 0.9}
        engine = make_engine(**options)
        checkpointer = make_checkpointer(engine, output_dir)
        train_steps(engine, 0, 3)
        gathered = whole_state(engine)
        stall = checkpointer.save(3)
        assert 0 < stall < 60
        train_steps(engine, 3, 6)  # while it is being written
        expected = own_state(engine)
        checkpointer.wait()

        resumed = make_engine(**options, seed=7)
        resumed.config.seed = resumed.optimizer.seed = 42  # pyright: ignore
        assert differing(own_state(resumed), expected)
        assert load_checkpoint(resumed, output_dir / "checkpoint-3", SIZES) == 3
        train_steps(resumed, 3, 6)
        assert differing(own_state(resumed), expected) == []
        if dist.get_rank() == 0:
            torch.save(gathered, output_dir / "gathered.pt")


def load_in_processes(folder: Path) -> None:
    """Loads what one process wrote."""
    engine = make_engine(ema_decay=0.9, seed=8)
    assert load_checkpoint(engine, folder / "checkpoint-5", SIZES) == 5
    expected = torch.load(folder / "gathered.pt")
    assert differing(whole_state(engine), expected) == []


def test_resume_is_bitwise_on_any_number_of_processes(tmp_path: Path) -> None:
    spawn(resume_in_processes, tmp_path)
    join_alone()
    for optimizer in OPTIMIZERS:
        output_dir = tmp_path / optimizer
        assert [p.name for p in finished_checkpoints(output_dir)] == ["checkpoint-3"]
        engine = make_engine(optimizer=optimizer, ema_decay=0.9, seed=9)
        load_checkpoint(engine, output_dir / "checkpoint-3", SIZES)
        assert differing(whole_state(engine), torch.load(output_dir / "gathered.pt")) == []
        assert read_trainer_state(output_dir / "checkpoint-3")["world_size"] == 2

    engine = make_engine(ema_decay=0.9)
    train_steps(engine, 0, 2)
    make_checkpointer(engine, tmp_path).save(5)
    torch.save(whole_state(engine), tmp_path / "gathered.pt")
    deadline = time.monotonic() + 240
    while find_checkpoint("latest", tmp_path) is None:  # with no further call
        assert time.monotonic() < deadline
        time.sleep(0.05)
    spawn(load_in_processes, tmp_path)


def poll_for_long(checkpointer: Any) -> None:
    checkpointer.num_polls = 0
    while checkpointer.num_polls < 10_000:
        checkpointer.num_polls += 1
        checkpointer.poll()
        time.sleep(0.01 * dist.get_rank())  # they come at different times


def fail_on_one_process(folder: Path) -> None:
    """One process may write no file above 4 KB: all raise, and all at the same step."""
    engine = make_engine()
    train_steps(engine, 0, 1)
    checkpointer: Any = make_checkpointer(engine, folder)
    checkpointer.save(1)
    checkpointer.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    checkpointer.save(2)
    with pytest.raises(OSError, match=r"checkpoint-2 could not .*process 1.*last good one is"):
        poll_for_long(checkpointer)
    counts = torch.tensor([checkpointer.num_polls, -checkpointer.num_polls])
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    assert counts[0] == -counts[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    dist.barrier()
    names = [path.name for path in folder.iterdir()]
    dist.barrier()
    assert names == ["checkpoint-1"], names
    checkpointer.save(3)  # the error is over
    checkpointer.wait()
    assert find_checkpoint("latest", folder) == folder / "checkpoint-3"


def test_an_error_of_one_process_is_every_ones(tmp_path: Path) -> None:
    spawn(fail_on_one_process, tmp_path)


def is_begun(folder: Path) -> bool:
    """Looks also while the folder gets another name, which os.walk does not mind."""
    return any(name.endswith(".distcp") for _, _, names in os.walk(folder) for name in names)


def die_while_saving(folder: Path) -> None:
    engine = make_engine()
    train_steps(engine, 0, 1)
    checkpointer = make_checkpointer(engine, folder)
    checkpointer.save(1)
    checkpointer.wait()
    train_steps(engine, 1, 2)
    checkpointer.save(2)
    while not (is_begun(folder / "checkpoint-2.partial") or (folder / "checkpoint-2").exists()):
        pass  # the saving thread may have finished before this one looks
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(die_while_saving, tmp_path, processes=1)
    join_alone()
    latest = find_checkpoint("latest", tmp_path)
    assert latest is not None
    engine = make_engine(seed=1)
    step = load_checkpoint(engine, latest, SIZES)
    again = make_engine()
    train_steps(again, 0, step)
    assert differing(own_state(engine), own_state(again)) == []
    make_checkpointer(engine, tmp_path)  # clears what was left
    assert not list(tmp_path.glob("*.partial"))


def fill_disk(folder: Path) -> None:
    """Saves on a disk that holds one checkpoint, not two."""
    join_alone()
    engine = make_engine()
    train_steps(engine, 0, 1)
    checkpointer = make_checkpointer(engine, folder)
    checkpointer.save(1)
    checkpointer.wait()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - size // 2))
    checkpointer.save(2)
    with pytest.raises(OSError, match=r"checkpoint-2 .*No space left.*Free some space") as caught:
        checkpointer.wait()
    assert "\n" not in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {"ballast", "checkpoint-1"}
    assert load_checkpoint(make_engine(), folder / "checkpoint-1", SIZES) == 1
    (folder / "ballast").unlink()
    checkpointer.save(3)
    checkpointer.wait()
    assert find_checkpoint("latest", folder) == folder / "checkpoint-3"


def test_full_disk(tmp_path: Path) -> None:
    """The disk is a real one: a small file system in memory, seen by one program."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64m tmpfs {disk}"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    module = "tests.longcat_video_fft.training.test_checkpoint"
    code = f"import {module} as t, pathlib; t.fill_disk(pathlib.Path({str(disk)!r}))"
    found = subprocess.run(
        [*alone, f'{mount} && exec "$0" -c "$1"', sys.executable, code],
        env=launch_env(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Writes checkpoints of steps 1 and 2."""
    join_alone()
    engine = make_engine()
    checkpointer = make_checkpointer(engine, tmp_path)
    for step in (1, 2):
        train_steps(engine, step - 1, step)
        checkpointer.save(step)
    checkpointer.wait()
    return tmp_path


def cut(folder: Path) -> None:
    file = next((folder / "state").glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def lose_metadata(folder: Path) -> None:
    (folder / "state" / ".metadata").unlink()


def lose_trainer_state(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def cut_trainer_state(folder: Path) -> None:
    os.truncate(folder / "trainer_state.json", 20)


def rename_to_partial(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}.partial"))


@pytest.mark.parametrize(
    "damage", [cut, lose_metadata, lose_trainer_state, cut_trainer_state, rename_to_partial]
)
def test_a_damaged_checkpoint_is_never_the_latest(saved: Path, damage: Any) -> None:
    assert find_checkpoint("latest", saved) == saved / "checkpoint-2"
    damage(saved / "checkpoint-2")
    assert find_checkpoint("latest", saved) == saved / "checkpoint-1"
    with pytest.raises(ValueError, match=r"not a finished checkpoint.*ones in .*: checkpoint-1\."):
        find_checkpoint(str(saved / "checkpoint-2"), saved)
    assert load_checkpoint(make_engine(), saved / "checkpoint-1", SIZES) == 1


def test_changed_bytes_are_an_error(saved: Path) -> None:
    file = next((saved / "checkpoint-2" / "state").glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be read .*earlier checkpoint"):
        load_checkpoint(make_engine(), saved / "checkpoint-2", SIZES)


def test_another_run_is_an_error_by_what_differs(saved: Path) -> None:
    folder = saved / "checkpoint-2"
    with pytest.raises(ValueError, match=r"transformer\.depth is 2 there, but 3 in this run"):
        load_checkpoint(make_engine(), folder, {**SIZES, "depth": 3})
    with pytest.raises(ValueError, match="optimizer is 'adamw_bf16' there, but 'adamw_8bit' in"):
        load_checkpoint(make_engine(optimizer="adamw_8bit"), folder, SIZES)
    with pytest.raises(ValueError, match="has_ema is False there, but True in this run"):
        load_checkpoint(make_engine(ema_decay=0.9), folder, SIZES)
    assert compare({"a": [1], "b": {"c": 1}}, {"a": [1], "b": {"c": 1}}) == []
    assert compare({"a": {"b": 1}}, {"c": 2}) == [
        "a is {'b': 1} there, but None in this run",
        "c is None there, but 2 in this run",
    ]


def test_what_find_checkpoint_takes(saved: Path) -> None:
    assert find_checkpoint(None, saved) is None
    assert find_checkpoint("latest", saved / "nothing") is None
    assert find_checkpoint(str(saved / "checkpoint-1"), saved) == saved / "checkpoint-1"
    assert checkpoint_step(saved) is None
    (saved / "checkpoint-10").mkdir()
    shutil.copytree(saved / "checkpoint-1", saved / "checkpoint-9")
    assert [p.name for p in finished_checkpoints(saved)] == [
        "checkpoint-1", "checkpoint-2", "checkpoint-9",
    ]  # fmt: skip


def test_the_newest_are_kept(tmp_path: Path) -> None:
    join_alone()
    engine = make_engine()
    checkpointer = make_checkpointer(engine, tmp_path, keep_last=2)
    for step in (1, 2, 3):
        train_steps(engine, step - 1, step)
        checkpointer.save(step)
    assert checkpointer.save(3) == 0.0  # the run's end after the last regular one
    checkpointer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert {"state/.metadata", "state/__0_0.distcp"} == set(state["files"])


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        # 1000 weights, 2 bytes each in the export; 12 checkpoints in all.
        ({"checkpoints_total_limit": 2}, 1000 * (6 * 3 + 2)),
        ({"checkpoints_total_limit": 2, "optimizer": "adamw"}, 1000 * (12 * 3 + 2)),
        ({"checkpoints_total_limit": 2, "optimizer": "adamw_8bit"}, 1000 * (4 * 3 + 2)),
        ({"checkpoints_total_limit": 2, "ema_decay": 0.9}, 1000 * (10 * 3 + 2)),
        ({"checkpoints_total_limit": 50}, 1000 * (6 * 12 + 2)),
        ({"checkpoints_total_limit": 0}, 1000 * (6 * 12 + 2)),
        ({"checkpointing_steps": 40_000}, 1000 * (6 + 2)),
    ],
)
def test_room_for_checkpoints_and_export(
    changes: dict[str, Any], needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(20, 50, bias=False)
    config = TrainConfig(**changes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed))
    check_disk(model, config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(ValueError, match=r"checkpoint\(s\) and the exported .* are free"):
        check_disk(model, config, tmp_path)
