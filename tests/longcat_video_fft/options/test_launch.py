"""scripts/launch_training.sh and train.sbatch: what they start, with what arguments, from anywhere.

`accelerate`, `nvidia-smi`, `scontrol` and `srun` on PATH are programs of the tests that write down
how they were called; what accelerate itself makes of these arguments is in test_config_rules.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.longcat_video_fft.support.plan_samples import write_planned
from tests.longcat_video_fft.support.tiny import ROOT, Tiny, launch_env

FOLDER = ROOT / "longcat_video_fft"
SCRIPT = FOLDER / "scripts" / "launch_training.sh"
SBATCH = FOLDER / "scripts" / "train.sbatch"

RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
# Of a program that a signal ends: for five minutes, so that it does not outlive a test that fails.
WAIT = "for _ in $(seq 6000); do sleep 0.05; done"


@dataclass
class Shell:
    """Runs the scripts with recording programs first on PATH, without a GPU."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        self.record = self.folder / "record.jsonl"
        self.program("accelerate", RECORDER)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, **env: str) -> dict[str, str]:
        python = str(Path(sys.executable).parent)
        path = os.pathsep.join([str(self.bin), python, os.environ["PATH"]])
        kept = {
            key: value
            for key, value in launch_env().items()
            if not key.startswith(("SLURM_", "CUDA_VISIBLE", "NUM_PROCESSES", "MASTER_"))
        }
        return {**kept, "PATH": path, "RECORD": str(self.record), **self.env, **env}

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run_script(SCRIPT, *argv, **env)

    def run_script(self, script: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(script), *argv], cwd=self.folder, env=self.environment(**env),
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.is_file() else []
        return [json.loads(line) for line in lines]

    def started(self, *argv: str, **env: str) -> tuple[dict[str, str], list[str]]:
        """Returns (accelerate's own options, the training's arguments) of the one launch."""
        done = self.run(*argv, **env)
        assert done.returncode == 0, done.stderr
        ((name, launch, *rest),) = self.calls()
        assert (name, launch) == ("accelerate", "launch")
        module = rest.index("-m")
        assert rest[module + 1] == "longcat_video_fft.train"
        own = rest[:module]
        return dict(zip(own[::2], own[1::2], strict=True)), rest[module + 2 :]


@pytest.fixture
def planned(tmp_path: Path, tiny: Tiny) -> Path:
    return write_planned(tmp_path / "planned", tiny)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_without_arguments_it_starts_the_shipped_config(shell: Shell) -> None:
    launch, training = shell.started()
    assert launch == {
        "--config_file": str(FOLDER / "scripts/accelerate_fsdp2.yaml"),
        "--num_processes": "1",
        "--num_machines": "1",
        "--machine_rank": "0",
    }
    assert training == [f"--config={FOLDER / 'training_config.json'}"]


def test_all_three_ways_to_write_an_option(shell: Shell) -> None:
    (shell.folder / "own.json").write_text("{}")
    _, training = shell.started(
        "seed=1", "--learning_rate", "1e-4", "--output_dir=a b=c", "--disable_tf32",
        "--logit_mean", "-1", "--validation_prompt", "a cat=dog", "--config", "own.json",
        "--validation_negative_prompt=", "--fp8_linears",
    )  # fmt: skip
    assert training == [
        "--config=own.json", "--seed=1", "--learning_rate=1e-4", "--output_dir=a b=c",
        "--disable_tf32=true", "--logit_mean=-1", "--validation_prompt=a cat=dog",
        "--validation_negative_prompt=", "--fp8_linears=true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "listed", "expected"),
    [
        (None, 8, "8"),
        ("0,3,5", 8, "3"),
        ("2", 8, "1"),
        ("", 8, "1"),
        ("0,-1,1", 8, "1"),
        ("GPU-1a2b,GPU-3c4d", 8, "2"),
        (None, 0, "1"),
    ],
)
def test_a_process_a_gpu(shell: Shell, visible: str | None, listed: int, expected: str) -> None:
    lines = "\n".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})" for i in range(listed))
    shell.program("nvidia-smi", f"#!/bin/sh\ncat <<'X'\n{lines}\nX\n")
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    launch, _ = shell.started(**env)
    assert launch["--num_processes"] == expected


def test_resume_takes_a_folder_or_latest(shell: Shell) -> None:
    (shell.folder / "out" / "checkpoint-5000").mkdir(parents=True)
    _, training = shell.started("--resume", "out/checkpoint-5000", "seed=2")
    assert training[1:] == ["--seed=2", "--resume_from_checkpoint=out/checkpoint-5000"]
    shell.record.unlink()
    _, training = shell.started("--resume=latest")
    assert training[1:] == ["--resume_from_checkpoint=latest"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--resume", "out/checkpoint-7"),
         "--resume out/checkpoint-7: no such checkpoint (from {cwd}). In out: checkpoint-500 "
         "checkpoint-1000"),
        (("--resume", "gone/checkpoint-7"),
         "--resume gone/checkpoint-7: no such checkpoint (from {cwd}). In gone: none"),
        (("--resume",), "--resume needs a value."),
        (("--resume", "--dry-run"), "--resume needs a value."),
        (("--config", "none.json"), "--config none.json: no such file (from {cwd})."),
        (("output",), "output: write key=value, --key value or --key=value, for example seed=1."),
        (("--num_machines", "2"), "--num_machines 2 needs --machine_rank, 0 to 1."),
        (("--num_machines=2", "--machine_rank=1"),
         "--num_machines 2 needs --main_process_ip, the address of machine 0."),
        (("--num_machines=2", "--machine_rank=1", "--main_process_ip=h", "--num_processes=9"),
         "--num_processes 9 is for all machines together and does not divide by their number, 2."),
    ],
)  # fmt: skip
def test_mistakes_start_nothing(shell: Shell, argv: tuple[str, ...], message: str) -> None:
    for step in (1000, 500):
        (shell.folder / "out" / f"checkpoint-{step}").mkdir(parents=True)
    done = shell.run(*argv)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: " + message.format(cwd=shell.folder)
    assert not shell.calls()


def test_several_machines_by_flags(shell: Shell) -> None:
    launch, training = shell.started(
        "--num_machines", "2", "--machine_rank=1", "--main_process_ip", "10.0.0.1",
        "--main_process_port=1234", "--num-processes", "16", "seed=3",
    )  # fmt: skip
    own = {key: value for key, value in launch.items() if key != "--config_file"}
    assert own == {
        "--num_processes": "16", "--num_machines": "2", "--machine_rank": "1",
        "--main_process_ip": "10.0.0.1", "--main_process_port": "1234",
    }  # fmt: skip
    assert training[1:] == ["--seed=3"]


SLURM = {
    "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}  # fmt: skip


def test_several_machines_by_slurm(shell: Shell) -> None:
    shell.program(
        "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && echo node3 && echo node4\n'
    )
    launch, _ = shell.started(**SLURM)
    own = {key: value for key, value in launch.items() if key != "--config_file"}
    assert own == {
        "--num_processes": "8", "--num_machines": "2", "--machine_rank": "1",
        "--main_process_ip": "node3", "--main_process_port": "29500",
    }  # fmt: skip


def test_a_slurm_task_a_gpu_is_an_error(shell: Shell) -> None:
    done = shell.run(**{**SLURM, "SLURM_STEP_NUM_TASKS": "8"})
    assert done.returncode == 2
    assert "8 tasks on 2 nodes: start one a node" in done.stderr
    assert not shell.calls()


def test_accelerate_of_the_python_where_none_is_on_path(shell: Shell) -> None:
    (shell.bin / "accelerate").unlink()
    shell.program("python", RECORDER.replace("import json", "import json, sys\nimport json", 1))
    env = shell.environment()
    env["PATH"] = os.pathsep.join([str(shell.bin), "/usr/bin", "/bin"])
    done = subprocess.run(
        ["bash", str(SCRIPT)], cwd=shell.folder, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    argv = shell.calls()[-1]
    assert argv[:4] == ["python", "-m", "accelerate.commands.accelerate_cli", "launch"]


def test_the_launchers_failure_is_the_scripts(shell: Shell) -> None:
    shell.program("accelerate", "#!/bin/sh\nexit 7\n")
    assert shell.run().returncode == 7


def test_sigterm_reaches_the_training_and_not_the_launcher(shell: Shell) -> None:
    """accelerate would kill its processes 30 seconds after it gets one itself."""
    shell.program(
        "accelerate",
        "#!/usr/bin/env bash\n"
        "trap 'echo launcher got it' TERM\n"
        f"bash -c 'trap \"echo saved; exit 0\" TERM; echo ready; {WAIT}'\n"
        "echo ended\n",
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPT)], cwd=shell.folder, env=shell.environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=240)
    assert rest == "saved\nended\n"
    assert process.returncode == 0


def test_sbatch_starts_a_task_a_node_and_resumes_when_queued_again(shell: Shell) -> None:
    shell.program("srun", RECORDER)
    for count, more in (("0", []), ("1", ["--resume", "latest"])):
        done = shell.run_script(
            SBATCH, "seed=1", SLURM_SUBMIT_DIR=str(FOLDER), SLURM_RESTART_COUNT=count,
            SLURM_JOB_ID="5",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        name, *flags, bash, script = shell.calls()[-1][:5]
        assert (name, bash, script) == ("srun", "bash", str(SCRIPT))
        assert flags == ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        assert shell.calls()[-1][5:] == ["seed=1", *more]


def test_sbatch_saves_before_its_time_is_up_and_queues_again(shell: Shell) -> None:
    """Its second srun runs pkill here; the training's processes are found by their command line."""
    shell.program("scontrol", RECORDER)
    worker = "exec -a longcat-test-python bash worker -u -m longcat_video_fft.train"
    (shell.folder / "worker").write_text(
        f"trap 'echo saved; exit 0' TERM\necho $$ > pid\necho ready\n{WAIT}\n"
    )
    shell.program(
        "srun",
        "#!/usr/bin/env bash\n"
        f'if [ "$1" = --overlap ]; then echo "$*" > "$RECORD.overlap"; kill -TERM "$(cat pid)"\n'
        f"else {worker}; fi\n",
    )
    process = subprocess.Popen(
        ["bash", str(SBATCH)], cwd=shell.folder, stdout=subprocess.PIPE, text=True,
        env=shell.environment(SLURM_SUBMIT_DIR=str(FOLDER), SLURM_JOB_ID="5"),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=240)
    assert (rest, process.returncode) == ("saved\n", 0)
    assert shell.calls() == [["scontrol", "requeue", "5"]]
    argv = Path(f"{shell.record}.overlap").read_text().split()
    assert argv[:3] == ["--overlap", "--ntasks-per-node=1", "pkill"]
    pattern = argv[argv.index("-f") + 1 :]
    command = "/opt/bin/python -u -m longcat_video_fft.train --config=x"
    launcher = "/opt/bin/python /opt/bin/accelerate launch -m longcat_video_fft.train --config=x"
    grep = ["grep", "-cE", " ".join(pattern)]
    assert subprocess.run(grep, input=command, text=True, capture_output=True).stdout == "1\n"
    assert subprocess.run(grep, input=launcher, text=True, capture_output=True).stdout == "0\n"


def test_a_real_dry_run_from_elsewhere(shell: Shell, planned: Path) -> None:
    """The plan itself runs, without accelerate."""
    done = shell.run("--dry-run", "--config", str(planned), "--num_processes", "2", "seed=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 GPUs of" in done.stdout
    assert "1 x gradient_accumulation_steps 4 x 2 GPUs" in done.stdout
    assert done.stdout.endswith("Nothing was found that would stop the run.\n")
    done = shell.run("--dry-run", "--config", str(planned), "resume_from_checkpoint=latest",
                     "context_parallel_size=3", NUM_PROCESSES="4")  # fmt: skip
    assert done.returncode == 1
    assert "context_parallel_size=3 does not divide the 4 devices" in done.stdout
    assert not shell.calls()
