"""One rank of a job that torchrun started: calls a model in which it waits for the other rank.

Arguments: the checkpoint, the job's name, the rank that loads and calls first, and a folder for files that ranks and
test wait for.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from hf.describe import digest
from support.waiting import wait_until
from torch import distributed

import wooly_hf  # noqa: F401 - registers the device map

STEPS = 20
WITHIN_S = 120.0


def main():
    path, job, first, folder = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    rank = int(os.environ["RANK"])

    def reach(what):
        (folder / f"{job}{rank} {what}").touch()

    def wait_for(file):
        wait_until((folder / file).exists, file, timeout_s=WITHIN_S)

    if rank != first:
        wait_for(f"{job}{first} loaded")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map="wooly:cpu", wooly_workload=f"{job}{rank}", wooly_compute_share=25
    )
    reach("loaded")
    distributed.init_process_group("gloo")
    calls = torch.zeros(1)

    def meet(*_):
        reach("inside")
        distributed.all_reduce(calls)

    model.model.layers[0].register_forward_hook(meet)
    wait_for("go")
    if rank != first:
        wait_for(f"{job}{first} inside")
    for number in range(1, STEPS + 1):
        with torch.no_grad():
            logits = model(torch.arange(3, 40)[None]).logits
        calls.fill_(number)
    (folder / f"{job}{rank}.json").write_text(json.dumps(digest(logits)))
    reach("done")
    wait_for("end")
    distributed.destroy_process_group()


main()
