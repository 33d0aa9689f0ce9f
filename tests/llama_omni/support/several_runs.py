"""Runs several training commands one after the other in the same processes.

    torchrun --nproc_per_node 2 -m tests.llama_omni.support.several_runs RUNS.json

RUNS.json is a list of {"argv": [...], "expect": exit code}. Starting Python with torch takes longer
than a tiny run, and two processes take it twice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from llama_omni.train import main

if __name__ == "__main__":
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(address, port, is_master=False)  # torchrun's own
    for number, run in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # Each run meets under keys of its own; main() takes the group that it finds.
        prefixed = PrefixStore(f"run {number}", store)
        dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size)
        code = main(run["argv"])
        if code != run["expect"]:
            sys.exit(f"exit code {code} instead of {run['expect']}: {run['argv']}")
