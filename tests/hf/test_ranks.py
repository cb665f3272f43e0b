"""Ranks that torchrun started wait for each other, so they never wait for turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import wait_until

from shared_store.client.session import Session

PROGRAM = Path(__file__).with_name("rank_main.py")
NAMES = ["a0", "a1", "b0", "b1"]
WITHIN_S = 180.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def torchrun(store, checkpoint, tmp_path):
    """Return a function that starts a job of two ranks by its name, and the rank that comes first."""
    started = []

    def start(job, first):
        arguments = [str(PROGRAM), str(checkpoint("llama-tied")), job, str(first), str(tmp_path)]
        with (tmp_path / f"{job}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments],
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(
                            filter(None, [str(PROGRAM.parent.parent), os.environ.get("PYTHONPATH")])
                        ),
                        "HF_HUB_OFFLINE": "1",
                        "OMP_NUM_THREADS": "1",
                        "WOOLY_RUNTIME_DIR": str(store.directory),
                        "WOOLY_AUTOSTART": "0",
                    },
                    stdout=log,
                    stderr=log,
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.terminate()  # which ends its ranks
        process.wait(60)


def test_jobs_whose_ranks_start_in_opposite_order_do_not_wait_for_each_other(store, torchrun, tmp_path):
    """Within each call a rank waits for the other one, which may not wait for another job's turn meanwhile."""
    jobs = [torchrun("a", 0), torchrun("b", 1)]

    def reached(what):
        logs = "".join((tmp_path / f"{job}.log").read_text() for job in "ab")
        assert all(job.poll() is None for job in jobs), logs
        return all((tmp_path / f"{name} {what}").exists() for name in NAMES)

    wait_until(lambda: reached("loaded"), "all to have loaded", WITHIN_S)
    (tmp_path / "go").touch()
    wait_until(lambda: reached("done"), "all to have computed", WITHIN_S)
    with Session.connect(store.directory, autostart=False, name="test") as session:
        found = {it.name: it.compute for it in session.status().workloads}
    assert sorted(found) == NAMES
    for compute in found.values():
        assert (compute.gated, compute.held, compute.held_s) == (False, False, 0)
        assert "one of 2 ranks" in compute.ungated
    assert len({json.loads((tmp_path / f"{name}.json").read_text()) for name in NAMES}) == 1
    (tmp_path / "end").touch()
    assert [job.wait(WITHIN_S) for job in jobs] == [0, 0]
