"""A full GPU: the store's error names the bytes requested, the bytes free, and the processes that use the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import readable

from shared_store.base.errors import OutOfMemoryError
from shared_store.base.manifest import Blob
from shared_store.client.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LEFT = 1 << 30
"""Bytes that the other process leaves free."""
ASKED = 4 << 30

KEY = "ab" * 32
_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Start a process that allocates nearly all of the GPU until its input ends."""
    pytest.importorskip("torch")
    command = [sys.executable, "-c", _HOLD, str(LEFT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert readable(child.stdout, 120)
            assert child.stdout.readline() == "holding\n"
            yield child
        finally:
            child.kill()


def _processes(gpu: str) -> str:
    """Return lines of pid and MiB, as nvidia-smi prints them here."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits", "-i", gpu]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


@pytest.mark.usefixtures("vram_returned")
def test_the_error_names_bytes_requested_bytes_free_and_other_processes(
    gpu: str, other: subprocess.Popen[str], runtime_dir: Path
) -> None:
    """The publisher gets it over the socket; once the other process has ended, the same request succeeds."""
    with Session.connect(runtime_dir, autostart=True, name="test") as session:
        assert session.open(KEY, name="model", engine="test", device=gpu, publish=True, timeout_s=10) is None
        planned, _ = session.plan(KEY, [Blob(bytes(32), ASKED)])
        (segment,) = planned.segments
        with pytest.raises(OutOfMemoryError) as refused:
            session.fill(KEY, segment.id)
        text = str(refused.value)
        assert f"cannot allocate a segment of {segment.nbytes} bytes on {gpu}" in text
        assert segment.nbytes >= ASKED
        free = re.search(r": (\d+) bytes are free", text)
        assert free is not None
        assert 0 < int(free[1]) < ASKED
        listed = [line.split(",")[0].strip() for line in _processes(gpu).splitlines()]
        if listed:  # pids outside of any container, which may differ from those that this process sees
            assert all(f"pid {pid} (" in text for pid in listed)
        else:
            assert "NVML lists no process" in text
        assert "stop a process that uses this GPU" in text
        assert "unpin a model (`wooly unpin KEY`)" in text
        other.kill()
        other.wait()
        session.fill(KEY, segment.id).close()
