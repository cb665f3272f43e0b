"""The cap under MPS on a GPU: it takes effect, is refused where it would not, and its danger is as described.

Each test has an MPS daemon of its own, for the processes that it starts. Skipped without ``nvidia-cuda-mps-control``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING

from shared_store.client.session import Session
from shared_store.compute import mps

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

CONTROL = "nvidia-cuda-mps-control"
EAGER: dict[str, Any] = {"enforce_eager": True, "gpu_memory_utilization": 0.15}
COUNT = "import torch; print(torch.cuda.get_device_properties(0).multi_processor_count)"
CAP = "from shared_store.compute import mps; mps.cap(['GPU'])"


@pytest.fixture
def service(gpu: str, tmp_path: Path) -> Iterator[dict[str, str]]:  # noqa: ARG001 - skips without a GPU
    """Run an MPS daemon; return the variables for its clients."""
    if shutil.which(CONTROL) is None:
        pytest.skip(f"{CONTROL} is not installed")
    pipes, logs = tmp_path / "pipes", tmp_path / "logs"
    for directory in (pipes, logs):
        directory.mkdir()
    variables = {mps.PIPES: str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
    # With CUDA_VISIBLE_DEVICES set, the service would number GPUs differently from its clients.
    environment = {**{name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}, **variables}
    subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=60)
    try:
        yield variables
    finally:
        subprocess.run([CONTROL], input="quit\n", text=True, env=environment, check=False, timeout=120)


def run(code: str, variables: dict[str, str], percent: int | None) -> subprocess.CompletedProcess[str]:
    capped = {} if percent is None else {"WOOLY_MPS_PERCENT": str(percent)}
    environment = {**os.environ, **variables, **capped}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_capped_process_has_fewer_multiprocessors(service: dict[str, str]) -> None:
    """CUDA tells a client under MPS the multiprocessors that its cap leaves."""
    whole, capped = run(COUNT, service, None), run(f"{CAP}; {COUNT}", service, 25)
    assert whole.returncode == 0, whole.stderr
    assert capped.returncode == 0, capped.stderr
    assert 0 < int(capped.stdout) <= int(whole.stdout) // 2


def test_after_cuda_started_it_is_refused(service: dict[str, str]) -> None:
    done = run(f"import torch; torch.cuda.init(); {CAP}", service, 25)
    assert done.returncode != 0
    assert "CUDA has started in this process already" in done.stderr
    done = run(f"from shared_store.memory.cuda.driver import visible_gpus; {CAP}; {COUNT}", service, 25)
    assert done.returncode == 0, done.stderr


def test_without_a_daemon_it_is_refused(gpu: str, tmp_path: Path) -> None:  # noqa: ARG001 - skips without a GPU
    done = run(CAP, {mps.PIPES: str(tmp_path)}, 25)
    assert done.returncode != 0
    assert "needs an MPS control daemon" in done.stderr


@pytest.fixture
def store_outside(runtime_dir: Path) -> Iterator[None]:
    """Start the store of the engines outside of the service, as the documentation asks for."""
    with Session.connect(runtime_dir, name="test"):
        yield


@pytest.mark.usefixtures("store_outside")
def test_a_write_to_shared_weights_ends_the_neighbour_too(
    service: dict[str, str], engine: Any, checkpoint: Any
) -> None:
    """The danger that the log and the documentation state. Without MPS, ``test_refused_writes`` shows, others go on."""
    pytest.importorskip("vllm")
    path = checkpoint("llama")
    environment = {**service, "WOOLY_MPS_PERCENT": "50"}
    staying = engine(path, settings=EAGER, hold=True, environment=environment, **SHARING)
    before = staying.wait("answered")["tokens"]
    writer = engine(path, settings=EAGER, writes=True, environment=environment, **SHARING)
    assert writer.wait("answered")["tokens"] == before
    assert writer.finish() != 0
    staying.tell("go on")
    assert staying.finish() != 0
    assert not [event for event in staying.events if event["event"] == "answered again"]
    assert "may use 50% of the threads of a GPU" in "\n".join(staying.log)
    assert mps.DANGER in "\n".join(staying.log)
