"""The benchmark ``overcommit``: models, stores with a budget, engines and servers, and what the store knows of them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.models import large_llama as llama
from support.models.families import random_model
from support.servers import CPU_ENVIRONMENT, Server

from benchmarks.harness.figures import GIB, MIB
from benchmarks.harness.gpu import used_mib
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, wait_until
from shared_store.base.status import DeviceStatus
from shared_store.base.workloads import WorkloadStatus
from shared_store.client.session import Session
from shared_store.overcommit.agent import Agent
from shared_store.overcommit.mover import Holdings, Reached
from shared_store.runtime.options import ServeOptions

START_TIMEOUT_S = 500.0
STATE_TIMEOUT_S = 60.0
TINY = ("llama", "llama-tied", "qwen2", "qwen3")
"""Random models for a CPU, without a common tensor."""

BESIDE_KV = 4 * GIB
"""Bytes of an engine on a GPU beside weights and KV cache, at most: context, activations, graphs."""


@dataclass(frozen=True)
class Scale:
    """How large a measurement is, on a GPU or in a trial on a CPU.

    Attributes:
        batch: requests of an engine that is swapped while they run.
        tokens: of each of their answers.
        swaps: in one batch.
        batches: with that many swaps, whose tokens are compared.
        repeats: of each measured time.
        large_kv: bytes of the KV cache of swapped engines, of the neighbour, and of the four models.
        small_kv: bytes of the KV cache of servers of one model.
        max_len: longest request.
        window_s: seconds in which steps of the neighbour are measured, alone and beside swaps.
        deep_after_s: seconds after which a swapped server is taken off its GPU in the part ``deep``.
    """

    batch: int
    tokens: int
    swaps: int
    batches: int
    repeats: int
    large_kv: int
    small_kv: int
    max_len: int
    window_s: float
    deep_after_s: float


ON_GPU = Scale(64, 128, 20, 5, 10, 16 * GIB, 2 * GIB, 2048, 4.0, 2.0)
ON_CPU = Scale(4, 40, 4, 2, 3, 32 * MIB, 16 * MIB, 512, 1.0, 2.0)


@dataclass(frozen=True)
class Setup:
    """The machine, the models, and the options that all parts share.

    Attributes:
        device: the store's name of the device.
        total: its bytes.
        directory: where models are made.
        first: checkpoint of the first model.
        scale: how large measurements are.
        firsts: engines whose first swap is measured.
        engines: of the part ``density``.
        budget_s: seconds in which the part ``density`` starts engines.
        rate: requests a second for each model in the parts ``mix_*``.
        seconds: of the trace of the parts ``mix_*``.
    """

    device: str
    total: int
    directory: Path
    first: Path
    scale: Scale
    firsts: int
    engines: int
    budget_s: float
    rate: float
    seconds: float

    @property
    def on_gpu(self) -> bool:
        """Whether this is the measurement, and not a trial."""
        return self.device != "cpu"

    def models(self, count: int) -> list[Path]:
        """Return checkpoints without a common tensor; make those that are missing."""
        if not self.on_gpu:
            return [random_model(name, self.directory) for name in TINY[:count]]
        found = [self.first, *(self.first.with_name(f"{self.first.name}-{seed}") for seed in range(1, count))]
        for seed, model in enumerate(found):
            llama.run("make", str(model), "--seed", str(seed))
        return found

    def weights(self) -> int:
        """Return the bytes of the first model."""
        return weights_of(self.first)

    def awake(self, kv: int) -> int:
        """Return the bytes that an engine may have while it is resident."""
        return self.weights() + kv + (BESIDE_KV if self.on_gpu else 16 * MIB)

    def room_for(self, engines: int, kv: int) -> int:
        """Return a budget in which so many engines are resident at the same time, with something to spare."""
        return min(self.total, engines * self.awake(kv) + self.reserve + self.reserve)

    def share(self, kv: int) -> float:
        """Return ``gpu_memory_utilization`` for an engine with a KV cache of a fixed size."""
        return min(0.92, self.awake(kv) / self.total) if self.on_gpu else 0.1

    @contextlib.contextmanager
    def node(self, budget: int, **options: Any) -> Iterator[Node]:
        """Run a store with a budget, for workers and servers, until the block ends."""
        with Node("overcommit-worker") as node:
            swap = node.scratch / "swap"
            swap.mkdir(mode=0o700)
            options = {"vram_reserve": self.reserve, "swap_dir": swap, "deep_after_s": 0.0, **options}
            node.start(ServeOptions(node.directory, budget={self.device: budget}, **options).to_json())
            yield node

    @property
    def reserve(self) -> int:
        """Bytes that stay free."""
        return 2 * GIB if self.on_gpu else 0

    def engine(
        self, node: Node, name: str, model: Path, kv: int, *, job: Mapping[str, Any] | None = None, **environment: str
    ) -> Child:
        """Start an engine in a worker (``workers/overcommit.py``), which waits for the word ``start``."""
        given = dict(job or {})
        settings = {
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "seed": 0,
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "max_model_len": self.scale.max_len,
            "max_num_seqs": self.scale.batch,
            "gpu_memory_utilization": self.share(kv),
            "kv_cache_memory_bytes": kv,
            "enforce_eager": not self.on_gpu,
            **given.pop("settings", {}),
        }
        full = {
            "model": str(model),
            "workload": name,
            "batch": self.scale.batch,
            "tokens": self.scale.tokens,
            "settings": settings,
            **given,
        }
        return node.launch(name, "engine", full, **self._environment(node), **environment)

    def server(
        self,
        node: Node,
        name: str,
        model: Path,
        kv: int,
        *arguments: str,
        priority: int = 0,
        wooly: bool = True,
        eager: bool = False,
    ) -> Server:
        """Start `vllm serve`, with wooly or as it is shipped. The caller waits for it and stops it."""
        given = ["--max-model-len", str(self.scale.max_len), "--max-num-seqs", str(self.scale.batch)]
        given += ["--dtype", "bfloat16", "--skip-tokenizer-init", "--no-enable-prefix-caching"]
        given += ["--kv-cache-memory-bytes", str(kv), "--gpu-memory-utilization", f"{self.share(kv):.4f}"]
        if eager or not self.on_gpu:
            given += ["--enforce-eager"]
        if wooly:
            extra = {"fallback": False, "workload": name, "priority": priority}
            given += ["--load-format", "wooly", "--model-loader-extra-config", json.dumps(extra)]
        environment = {**self._environment(node), "WOOLY_RUNTIME_DIR": str(node.directory), "WOOLY_AUTOSTART": "0"}
        log = node.scratch / f"{name}.log"
        return Server(name, str(model), log, arguments=[*given, *arguments], environment=environment)

    def _environment(self, node: Node) -> dict[str, str]:
        found = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1"}  # it has `/sleep`
        if (node.scratch / "swap").exists():
            found["WOOLY_SWAP_DIR"] = str(node.scratch / "swap")
        if not self.on_gpu:
            found |= {name: value for name, value in CPU_ENVIRONMENT.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
            found |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return found

    def used(self) -> int:
        """Return the bytes that are in use on the GPU; 0 on a CPU, where the store's account is all there is."""
        return used_mib() * MIB if self.on_gpu else 0


def weights_of(model: Path) -> int:
    """Return the bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def row(session: Session, name: str) -> WorkloadStatus:
    """Return what the store knows of a workload."""
    return next(one for one in session.status().workloads if one.name == name)


def account(session: Session, device: str) -> DeviceStatus:
    """Return the store's account of a device."""
    return next(one for one in session.status().devices if one.id == device)


def bytes_of(workload: WorkloadStatus, device: str) -> tuple[int, int, int]:
    """Return private and shared bytes of a workload on a device, and the private ones that a swap does not free."""
    memory = next(one for one in workload.memory if one.device == device)
    return memory.private, memory.shared, memory.stays


def wait_for_state(session: Session, name: str, *states: str) -> None:
    """Wait until a workload is in one of the states. Raises :class:`TimeoutError`."""
    wait_until(lambda: row(session, name).state in states, f"{name} to be {' or '.join(states)}", STATE_TIMEOUT_S)


def prompt(number: int, length: int = 64) -> list[int]:
    """Return token ids that differ from number to number."""
    return [10 + (37 * number + 101 * j) % 500 for j in range(length)]


def answer_s(server: Server, number: int) -> float:
    """Return the seconds from a request to its first token, over HTTP."""
    began = time.monotonic()
    server.complete(prompt(number), max_tokens=1, timeout_s=120)
    return time.monotonic() - began


class Owner:
    """A workload of no engine that is never swapped out: it takes memory in the account alone."""

    def __init__(self, node: Node, device: str, nbytes: int) -> None:
        """Take ``nbytes``; blocks until they are granted."""
        self._needs = {device: nbytes}
        os.environ.pop("WOOLY_MEMBER_OF", None)
        self._agent = Agent(
            lambda identity: Session(node.directory, "owner", identity=identity),
            self,
            kind="vllm",
            name="owner",
            devices=(device,),
            refusal="it stands for memory that others use",
        )
        self._held: Mapping[str, int] = {}
        self._agent.join()
        self._agent.take_room(self._needs, STATE_TIMEOUT_S, lambda _reason: None)
        self._held = self._needs
        self._agent.joined_resident()

    def close(self) -> None:
        """Give it back."""
        self._agent.close()

    def leave(self, *, active: bool, within_s: float, reached: Reached) -> Holdings:
        """Do not leave: the store never asks."""
        raise NotImplementedError

    def come_back(self) -> Holdings:
        """Be there."""
        return self.holdings()

    def prepare_checkpoint(self) -> None:
        """Have nothing to prepare."""

    def holdings(self) -> Holdings:
        """Return what it took."""
        return Holdings(private=self._held, stays=self._held, needs=self._needs)
