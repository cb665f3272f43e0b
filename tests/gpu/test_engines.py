"""Real vLLM on a GPU, with torch.compile and CUDA graphs: shared weights give stock's tokens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.engines import SHARING, EngineProcess, status_of
from support.models import large_llama

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]

DENSE, SPARSE = ("llama", "llama-tied", "qwen3", "gemma3"), ("mixtral",)
GROUPS = (DENSE, SPARSE)
FAMILIES = (*DENSE, *SPARSE)
GRAPHS: dict[str, Any] = {"enforce_eager": False, "gpu_memory_utilization": 0.15}
ROLES: dict[str, dict[str, Any]] = {"stock": {}, "publisher": SHARING, "reader": SHARING}


@pytest.fixture(scope="module")
def runs(gpu: str, gpu_of_torch: str, module_runtime_dir: Path, checkpoint: Any) -> dict[str, dict[str, Any]]:
    """Return the answers of stock vLLM, of a publisher and of a reader, by family."""
    assert gpu_of_torch == gpu
    pytest.importorskip("vllm")
    paths = {family: checkpoint(family) for family in FAMILIES}
    answers: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    with contextlib.ExitStack() as stack:
        # All import vLLM at once, which takes long, and load one after the other. vLLM creates its groups for experts
        # with the first model of a process, or never, so dense and sparse models run in separate processes.
        turns = [(role, {str(paths[family]): family for family in group}) for role in ROLES for group in GROUPS]
        processes = []
        for role, every in turns:
            job = {"models": list(every), "settings": GRAPHS, "gate": True, **ROLES[role]}
            processes.append(EngineProcess(module_runtime_dir, job))
            stack.callback(processes[-1].close)
        for (role, every), process in zip(turns, processes, strict=True):
            process.wait("imported")
            process.tell("start")
            assert process.finish() == 0, "\n".join(process.log[-60:])
            events = [event for event in process.events if event["event"] == "answered"]
            answers[role] |= {every[event["model"]]: event for event in events}
    return answers


@pytest.mark.parametrize("role", ["publisher", "reader"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_stock_with_cuda_graphs(runs: Any, family: str, role: str) -> None:
    """Publisher and reader answer as stock vLLM does; the answers vary, so equality means something."""
    assert runs[role][family]["tokens"] == runs["stock"][family]["tokens"]
    assert len({token for answer in runs["stock"][family]["tokens"] for token in answer}) > 10


@pytest.mark.usefixtures("runs")
def test_each_model_was_published_once(module_runtime_dir: Path) -> None:
    """The readers attached; nothing fell back."""
    counters = status_of(module_runtime_dir).counters
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (len(FAMILIES), 2 * len(FAMILIES), 0)


@pytest.mark.usefixtures("vram_returned")
def test_engines_started_together_get_the_same_kv_cache_and_leave_nothing(
    engine: Any, tmp_path: Path, runtime_dir: Path
) -> None:
    """Three start at once with one utilization: publisher and readers get equal KV caches; VRAM is freed in the end."""
    pytest.importorskip("vllm")
    model = tmp_path / "model"
    large_llama.run("make", str(model), "--layers", "4")
    settings = {"enforce_eager": True, "gpu_memory_utilization": 0.3}
    processes = [engine(model, settings=settings, hold=True, **SHARING) for _ in range(3)]
    answers = [process.wait("answered") for process in processes]
    blocks = [answer["kv_blocks"] for answer in answers]
    assert max(blocks) <= 1.02 * min(blocks), blocks
    assert [answer["tokens"] for answer in answers] == [answers[0]["tokens"]] * 3
    assert status_of(runtime_dir).counters.publishes == 1
    for process in processes:
        process.tell("go on")
        assert process.wait("answered again")["tokens"] == answers[0]["tokens"]
        assert process.finish() == 0


@pytest.mark.usefixtures("vram_returned")
def test_two_engines_work_for_a_minute_while_a_third_comes_and_goes(
    engine: Any, checkpoint: Any, runtime_dir: Path
) -> None:
    """With CUDA graphs: every answer is stock vLLM's throughout; VRAM is freed in the end."""
    pytest.importorskip("vllm")
    model = checkpoint("qwen3")
    # Prefix-cached tokens are computed by other kernels, with other last bits, also in stock vLLM.
    settings = {**GRAPHS, "enable_prefix_caching": False}
    stock = engine(model, settings=settings)
    workers = [engine(model, settings=settings, load=True, gate=True, **SHARING) for _ in range(2)]
    visitor = engine(model, settings=settings, gate=True, **SHARING)
    right = stock.wait("answered")["tokens"]
    assert stock.finish() == 0
    for worker in workers:
        worker.tell("start")
    answers = [worker.wait("answered") for worker in workers]
    working_since = time.monotonic()
    visitor.tell("start")
    answers.append(visitor.wait("answered"))
    assert visitor.finish() == 0
    threading.Event().wait(max(0.0, working_since + 60 - time.monotonic()))  # the test is about a minute of load
    for worker in workers:
        worker.tell("stop")
    for worker in workers:
        worked = worker.wait("worked")
        assert worked["rounds"] > 100
        assert worked["wrong"] == 0
        assert worker.finish() == 0
    assert [answer["tokens"] for answer in answers] == [right] * 3
    counters = status_of(runtime_dir).counters
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (1, 3, 0)


_CANARY = """
import os, sys
import torch
from shared_store.torch.views import bytes_in, part_of, storage_of
from shared_store.memory import Access, Mapping
from shared_store.memory.cuda.vmm import CudaBackend
torch.zeros(1, device="cuda")
backend = CudaBackend(sys.argv[2])
mapping = Mapping(backend, backend.import_fd(int(sys.argv[1]), 2 << 20))
mapping.map(Access.READ)
data = bytes_in(part_of(storage_of(mapping), 0, 1 << 20))
print("read", int(data.sum()), flush=True)
data.add_(1)
torch.cuda.synchronize()
print("written", flush=True)
"""


def test_a_kernel_that_writes_to_shared_memory_is_stopped_and_others_go_on(gpu: str) -> None:
    """The hardware refuses the write: the writing process fails, and the mappings of others do not change."""
    import os

    torch = pytest.importorskip("torch")
    from shared_store.memory import Access, Mapping
    from shared_store.memory.cuda.vmm import CudaBackend
    from shared_store.torch.views import bytes_in, part_of, storage_of

    torch.zeros(1, device="cuda")
    backend = CudaBackend(gpu)
    segment = backend.create(2 << 20)
    fd = backend.export(segment).detach()
    mapping = Mapping(backend, backend.import_fd(fd, 2 << 20))
    mapping.map(Access.WRITE)
    bytes_in(part_of(storage_of(mapping), 0, 1 << 20)).fill_(3)
    torch.cuda.synchronize()
    mapping.unmap()
    mapping.map(Access.READ)
    canary = subprocess.run(
        [sys.executable, "-c", _CANARY, str(fd), gpu],
        pass_fds=(fd,),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(fd)
    assert f"read {3 << 20}" in canary.stdout
    assert "written" not in canary.stdout
    assert canary.returncode != 0
    assert "illegal memory access" in canary.stderr
    assert int(bytes_in(part_of(storage_of(mapping), 0, 1 << 20)).sum()) == 3 << 20
    backend.release(segment)
