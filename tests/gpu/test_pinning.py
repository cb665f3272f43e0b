"""The arena of a GPU's worker: pinned, fast, and right after a driver's checkpoint, pinned or not."""

from __future__ import annotations

import subprocess

import pytest
from support.programs import start_program

from shared_store.base.errors import UnsupportedError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CHILD = """
import torch
from shared_store.memory.cuda.pinning import CudaPinning
from shared_store.private.arena import Arena
from shared_store.private.copies import HostCopy
from shared_store.private.ranges import PrivateMemory
from shared_store.torch.devices import backend_of
from shared_store.torch.views import bytes_in, storage_of
from wooly_vllm.residency import rows as tables
from wooly_vllm.residency.rows import Rows

device = torch.device("cuda", 0)
memory = PrivateMemory(backend_of(device))
data = bytes_in(storage_of(memory.allocate(512 << 20)))
rows = [Rows(data, 0, 64 << 10, 64 << 10, data.numel() >> 16)]
rows[0].table().copy_(torch.randint(1 << 62, rows[0].table().shape, device=device))
right = data.clone().cpu()
arena = Arena(CudaPinning(0))
copy = HostCopy(arena)
tables.save(rows, range(rows[0].count), copy)
piece = copy._pieces[0]
print("pinned" if torch.frombuffer(piece, dtype=torch.uint8).is_pinned() else "not pinned", flush=True)
memory.go_away()
torch.cuda.empty_cache()
if input() == "unpin":
    arena.unpin()
print("ready", flush=True)
input()
arena.pin()
memory.come_back()
tables.zero(rows)
copy.rewind()
tables.restore(rows, range(rows[0].count), copy)
print("right" if torch.equal(data.cpu(), right) else "wrong", flush=True)
print("pinned" if torch.frombuffer(piece, dtype=torch.uint8).is_pinned() else "not pinned", flush=True)
"""


@pytest.mark.parametrize("pinned", ["unpin", "stay pinned"])
@pytest.mark.usefixtures("gpu", "vram_returned")
def test_copies_are_right_after_a_checkpoint(pinned: str) -> None:
    """A worker that is away is checkpointed and restored: its copies return, pinned again."""
    pytest.importorskip("torch")
    from shared_store.memory.cuda.checkpoint import Checkpoints

    try:
        checkpoints = Checkpoints()
    except UnsupportedError as error:
        pytest.skip(str(error))
    child = start_program(CHILD, stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "pinned\n", child.communicate()[1]
        child.stdin.write(pinned + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "ready\n"
        checkpoints.lock(child.pid, 10)
        checkpoints.checkpoint(child.pid)
        checkpoints.restore(child.pid)
        checkpoints.unlock(child.pid)
        out, err = child.communicate("go\n", timeout=120)
        assert (child.returncode, out.split()) == (0, ["right", "pinned"]), err
    finally:
        child.kill()
        child.communicate()
