"""run_deepspeed.sh: what it starts on each node, where it resumes, and how it stops.

`srun`, `deepspeed` and `scontrol` on PATH are programs of the tests that write down how they were
called; what DeepSpeed's launcher makes of its arguments, it says itself.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import vss_longcat_omni
from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

SCRIPT = Path(vss_longcat_omni.__file__).parent / "run_deepspeed.sh"
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
# As many tasks as nodes, one after the other.
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$RECORD.srun"
while [ "${1#--}" != "$1" ]; do shift; done
for id in $(seq 0 $((NODES - 1))); do SLURM_NODEID=$id "$@" || exit; done
"""
SCONTROL = f"""#!/usr/bin/env bash
if [ "$*" = "show hostnames node[3-4]" ]; then echo node3; echo node4
elif [ "$*" = "show hostnames node3" ]; then echo node3
else exec {sys.executable} "$0.record" "$@"; fi
"""


@dataclass
class Cluster:
    """Runs the script as SLURM does: a copy of it, in the folder where it was submitted."""

    folder: Path

    def __post_init__(self) -> None:
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        self.record = self.folder / "record.jsonl"
        self.script = shutil.copy(SCRIPT, self.folder / "slurm_script")
        (self.folder / "train_ds.py").touch()
        for name, text in [("srun", SRUN), ("deepspeed", RECORDER), ("scontrol", SCONTROL)]:
            self.program(name, text)
        (self.bin / "scontrol.record").write_text(RECORDER.replace("sys.argv[0])", "'scontrol')"))

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, *, NODES: str = "1", **env: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        path = os.pathsep.join(
            [str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        slurm = {
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "node[3-4]" if NODES == "2" else "node3",
            "SLURM_GPUS_ON_NODE": "8",
        }
        own = {"PATH": path, "RECORD": str(self.record), "NODES": NODES}
        return {**kept, **own, **slurm, **env}

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.script, *argv], cwd=self.folder, env=self.environment(**env),
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.is_file() else []
        return [json.loads(line) for line in lines]

    def started(self, *argv: str, **env: str) -> list[str]:
        """The training's arguments."""
        self.record.unlink(missing_ok=True)
        done = self.run(*argv, **env)
        assert done.returncode == 0, done.stderr
        ((_, *rest),) = self.calls()
        return rest[rest.index("train_ds.py") + 1 :]

    def add_checkpoint(self, name: str, *, is_whole: bool = True) -> None:
        (self.folder / name).mkdir(parents=True)
        if is_whole:
            (self.folder / name / "trainer_state.json").touch()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_launcher_a_node(cluster: Cluster, nodes: int) -> None:
    done = cluster.run("--learning_rate", "1e-5", "--system_prompt=a b", NODES=str(nodes))
    assert done.returncode == 0, done.stderr
    calls = cluster.calls()
    assert len(calls) == nodes
    for rank, (name, *argv) in enumerate(calls):
        assert name == "deepspeed"
        assert argv == [
            f"--node_rank={rank}", "--no_ssh", "--hostfile=logs/hosts-5", f"--num_nodes={nodes}",
            "--num_gpus=8", "--master_addr=node3", "--master_port=29500", "train_ds.py",
            "--learning_rate", "1e-5", "--system_prompt=a b",
        ]  # fmt: skip
    hosts = (cluster.folder / "logs" / "hosts-5").read_text().splitlines()
    assert hosts == ["node3 slots=8", "node4 slots=8"][:nodes]
    flags = Path(f"{cluster.record}.srun").read_text().split()
    assert flags[:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]


def test_deepspeeds_launcher_understands_these_argv(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a hostfile it accepts no more than one node, and with one it wants ssh but for us."""
    from deepspeed.launcher import runner

    started: list[list[str]] = []

    def popen(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    cluster.run("--seed=1", NODES="2", NUM_GPUS="4", MASTER_PORT="1234")
    monkeypatch.chdir(cluster.folder)
    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    for call in cluster.calls():
        runner.main(call[1:])
    for rank, command in enumerate(started):
        assert command[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]
        options = dict(arg[2:].split("=", 1) for arg in command[4:8])
        hosts = json.loads(base64.urlsafe_b64decode(options.pop("world_info")))
        assert hosts == {"node3": [0, 1, 2, 3], "node4": [0, 1, 2, 3]}
        assert options == {
            "master_addr": "node3", "master_port": "1234", "node_rank": str(rank),
        }  # fmt: skip
        assert command[-2:] == ["train_ds.py", "--seed=1"]
    assert len(started) == 2


RESUME = ["--resume_from_checkpoint", "latest"]


def test_it_resumes_where_the_output_dir_has_a_whole_checkpoint(cluster: Cluster) -> None:
    default = OmniTrainingArguments.__dataclass_fields__["output_dir"].default
    assert cluster.started() == []
    cluster.add_checkpoint(f"{default}/checkpoint-3", is_whole=False)
    assert cluster.started() == []
    cluster.add_checkpoint(f"{default}/checkpoint-2")
    assert cluster.started("--seed", "1") == ["--seed", "1", *RESUME]
    assert cluster.started("--output_dir", "my run") == ["--output_dir", "my run"]
    cluster.add_checkpoint("my run/checkpoint-20")
    assert cluster.started("--output_dir", "my run") == ["--output_dir", "my run", *RESUME]
    assert cluster.started("--output_dir=my run") == ["--output_dir=my run", *RESUME]
    assert cluster.started("--output_dir=none") == ["--output_dir=none"]


def test_it_finds_the_output_dir_of_a_config_file(cluster: Cluster) -> None:
    cluster.add_checkpoint("out/checkpoint-2")
    config = cluster.folder / "run.json"
    argv = ["--config", "run.json"]
    config.write_text('{"output_dir": "out", "resume_from_checkpoint": null}')
    assert cluster.started(*argv) == [*argv, *RESUME]
    assert cluster.started(*argv, "--output_dir=none") == [*argv, "--output_dir=none"]
    config.write_text('{"output_dir": "out", "resume_from_checkpoint": "out/checkpoint-1"}')
    assert cluster.started(*argv) == argv
    config.write_text("{")
    done = cluster.run(*argv)
    assert done.returncode != 0
    assert "JSONDecodeError" in done.stderr


def test_a_checkpoint_of_the_users_counts_until_the_job_is_queued_again(cluster: Cluster) -> None:
    cluster.add_checkpoint("out/checkpoint-20")
    argv = ["--output_dir=out", "--resume_from_checkpoint=out/checkpoint-10"]
    assert cluster.started(*argv, SLURM_RESTART_COUNT="0") == argv
    assert cluster.started(*argv, SLURM_RESTART_COUNT="1") == [*argv, *RESUME]


def test_a_failure_is_the_jobs_and_is_not_queued_again(cluster: Cluster) -> None:
    cluster.program("deepspeed", "#!/bin/sh\nexit 7\n")
    assert cluster.run().returncode == 7
    assert not cluster.calls()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_JOB_ID", "", "this is for SLURM: sbatch run_deepspeed.sh"),
        ("PATH", "/usr/bin:/bin", "no deepspeed on PATH. Activate the environment"),
        ("NODES", "1", "no train_ds.py in {folder}. Submit in vss_longcat_omni/"),
    ],
)
def test_mistakes_start_nothing(cluster: Cluster, name: str, value: str, message: str) -> None:
    if "train_ds.py" in message:
        (cluster.folder / "train_ds.py").unlink()
    done = cluster.run(**{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith("error: " + message.format(folder=cluster.folder))
    assert not cluster.calls()


def test_it_saves_before_its_time_is_up_and_queues_again(cluster: Cluster) -> None:
    """The second srun runs pkill; the training's processes are found by their command line."""
    (cluster.folder / "train_ds.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (print('saved', flush=True), sys.exit()))\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "print('ready', flush=True)\n"
        "for _ in range(6000):\n"
        "    time.sleep(0.05)\n"
    )
    # pkill -f would also find such processes of other tests: this one signals its own alone.
    worker = f"{sys.executable} -u train_ds.py --local_rank=0"
    cluster.program("deepspeed", f"#!/bin/sh\nexec {worker}\n")
    cluster.program("pkill", f'{RECORDER}os.kill(int(open("pid").read()), 10)\n')
    process = subprocess.Popen(
        ["bash", cluster.script], cwd=cluster.folder, env=cluster.environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=240)
    assert (rest, process.returncode) == ("saved\n", 0)
    (pkill, *argv), requeue = cluster.calls()
    assert requeue == ["scontrol", "requeue", "5"]
    assert (pkill, argv[:3]) == ("pkill", ["-USR1", "-u", str(os.getuid())])
    last = Path(f"{cluster.record}.srun").read_text().splitlines()[-1]
    assert last.startswith("--overlap --ntasks-per-node=1 pkill")
    pattern = argv[argv.index("-f") + 1]
    assert re.search(pattern, worker)
    launchers = [
        "/v/bin/python /v/bin/deepspeed --node_rank=0 --no_ssh train_ds.py --seed=1",
        "/v/bin/python -u -m deepspeed.launcher.launch --node_rank=0 train_ds.py --seed=1",
        f"srun --overlap --ntasks-per-node=1 {last.partition('pkill')[2]}",
    ]
    assert not any(re.search(pattern, command) for command in launchers)


def test_slurm_reads_where_the_log_goes_and_that_it_may_queue_again() -> None:
    text = SCRIPT.read_text()
    options = re.findall(r"^#SBATCH (--\S+)$", text, flags=re.MULTILINE)
    assert {"--output=logs/%x-%j.log", "--requeue", "--signal=B:USR1@600"} <= set(options)
    assert text.index("#SBATCH --output") < text.index("\nset -euo pipefail\n")
    assert (SCRIPT.parent / "logs" / ".gitignore").is_file()  # SLURM does not make the folder
