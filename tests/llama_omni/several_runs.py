"""Runs several training commands one after the other in the same processes.

    torchrun --nproc_per_node 2 -m tests.llama_omni.several_runs RUNS.json

RUNS.json is a list of {"argv": [...], "expect": exit code}. Starting Python with torch takes longer
than a tiny run, and two processes take it twice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama_omni.train import main

if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        code = main(run["argv"])
        if code != run["expect"]:
            sys.exit(f"exit code {code} instead of {run['expect']}: {run['argv']}")
