"""The benchmark ``compute``: the ways to share a device, stores and workloads for each, and windows of time."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.servers import CPU_ENVIRONMENT

from benchmarks.harness.figures import GIB, MIB
from benchmarks.harness.gpu import Mps
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, ChildError, wait_until
from benchmarks.scenarios.overcommit_setup import BESIDE_KV, weights_of
from shared_store.base.workloads import WorkloadStatus
from shared_store.compute import support
from shared_store.runtime.options import ServeOptions

START_TIMEOUT_S = 300.0
ARBITER_TIMEOUT_S = 30.0
LEAD_S = 0.3
"""Seconds before a window at which processes are told of it."""

HEAD_START_S = 1.0
"""Seconds by which the load of the other workload begins before a window."""


@dataclass(frozen=True)
class Way:
    """A way to share a device.

    Attributes:
        name: in the names of figures.
        arbiter: whether workloads take turns by priority and share.
        max_hold_s: seconds after which one that is held makes a step; 0: it makes none.
        mps: whether kernels run under NVIDIA's Multi-Process Service.
        percent: of a GPU's threads that the less important workload may use under it; 0: all.
    """

    name: str
    arbiter: bool = False
    max_hold_s: float = 0.0
    mps: bool = False
    percent: int = 0


PLAIN = Way("plain")
HOLD_0 = Way("hold_0", arbiter=True)
HOLD_2 = Way("hold_2", arbiter=True, max_hold_s=2.0)
WAYS = {way.name: way for way in (PLAIN, HOLD_0, HOLD_2, Way("mps", mps=True), Way("mps_capped", mps=True, percent=25))}
"""``plain``: as the driver (or the kernel, on a CPU) slices time."""


@dataclass(frozen=True)
class Scale:
    """How large a measurement is.

    Attributes:
        window_s: seconds of a window with steady load.
        rounds: windows of each kind.
        requests_s: seconds of a window with Poisson arrivals at an engine.
        step_requests_s: the same for synthetic steps, whose requests are shorter.
        share_s: seconds of a window in which shares are compared.
        share_rounds: windows of those.
        decode_s: of a synthetic step like one of a decode.
        prefill_s: of a synthetic step like one of a long prefill.
        kv: bytes of an engine's KV cache.
        max_len: longest request of an engine.
        batched: most tokens of an engine's step.
        prompt: tokens of an ordinary prompt.
        answer: tokens of an answer to Poisson requests.
        long_prompt: tokens of a prompt of the load.
        concurrency: requests of the load at the same time.
        batch: requests of each of several equal engines.
    """

    window_s: float
    rounds: int
    requests_s: float
    step_requests_s: float
    share_s: float
    share_rounds: int
    decode_s: float
    prefill_s: float
    kv: int
    max_len: int
    batched: int
    prompt: int
    answer: int
    long_prompt: int
    concurrency: int
    batch: int


ON_GPU = Scale(3.0, 5, 15.0, 5.0, 10.0, 3, 0.00173, 0.022, 2 * GIB, 8192, 8192, 128, 32, 4000, 4, 16)
ON_CPU = Scale(2.0, 3, 6.0, 4.0, 10.0, 3, 0.00173, 0.022, 32 * MIB, 512, 512, 32, 32, 440, 4, 4)


@dataclass(frozen=True)
class Setup:
    """The machine, the model, and the options that all parts share.

    Attributes:
        device: the store's name of the device.
        total: its bytes.
        core: of a CPU: the core that stands for the device; None on a GPU.
        model: checkpoint of the engines.
        scale: how large measurements are.
        engines: of the part ``engines_many``.
    """

    device: str
    total: int
    core: int | None
    model: Path
    scale: Scale
    engines: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @contextlib.contextmanager
    def fleet(self, way: Way) -> Iterator[Fleet]:
        """Run a store for workloads that share the device in a way, until the block ends."""
        if way.mps and not self.on_gpu:
            raise ChildError("NVIDIA's Multi-Process Service needs a GPU")
        if way.arbiter and self.on_gpu and not support.GPUS:
            raise ChildError(f"{support.UNGATED}: set GPUS in shared_store/compute/support.py to measure them")
        with contextlib.ExitStack() as stack:
            # In sessions of their own, one engine on a shared core was not scheduled for seconds beside another one.
            node = stack.enter_context(Node("compute-engine-worker", own_sessions=self.on_gpu))
            options = ServeOptions(
                node.directory,
                budget={self.device: self.total},
                vram_reserve=0,
                arbiter=way.arbiter,
                max_hold_s=way.max_hold_s,
            )
            node.start(options.to_json())  # outside of the service, which does not end before its clients
            environment: dict[str, str] = {}
            if way.mps:
                environment = stack.enter_context(Mps(node.scratch)).environment
                stack.callback(node.end_all)  # before the service
            yield Fleet(self, way, node, environment)


@dataclass
class Fleet:
    """A store, and the workloads that use it."""

    setup: Setup
    way: Way
    node: Node
    environment: Mapping[str, str]
    tenants: list[Tenant] = field(default_factory=list)

    def steps(self, name: str, kind: str, pieces: Mapping[str, int], priority: int = 2, share: float = 0) -> Tenant:
        """Start a workload of synthetic steps of a kind: ``decode`` or ``prefill``."""
        job = {
            "device": self.setup.device,
            "core": self.setup.core,
            "pieces": pieces,
            "workload": name if self.way.arbiter else "",
            "priority": priority,
            "share": share,
        }
        child = self.node.launch(name, "steps", job, worker="compute-steps-worker", **self._environment(priority))
        commands: dict[str, dict[str, Any]] = {
            "tokens": {"kind": kind},
            "load": {"kind": kind},
            "requests": {"kind": kind, "tokens": self.setup.scale.answer},
        }
        return self._add(child, commands)

    def engine(self, name: str, priority: int = 2, *, role: str = "engine", **settings: Any) -> Tenant:
        """Start a vLLM engine."""
        scale = self.setup.scale
        share = min(0.92, (weights_of(self.setup.model) + scale.kv + BESIDE_KV) / self.setup.total)
        full = {
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "seed": 0,
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "max_model_len": scale.max_len,
            "max_num_seqs": max(scale.batch, scale.concurrency),
            "max_num_batched_tokens": scale.batched,
            "kv_cache_memory_bytes": scale.kv,
            "gpu_memory_utilization": share if self.setup.on_gpu else 0.1,
            "enforce_eager": not self.setup.on_gpu,
            **settings,
        }
        if not self.setup.on_gpu:  # vLLM would start a worker that waits for its core by spinning on the same core
            full["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        job = {"model": str(self.setup.model), "settings": full, "core": self.setup.core}
        environment = {
            **self._environment(priority),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if role == "engine" else "0",
            "WOOLY_WORKLOAD": name,
            "WOOLY_PRIORITY": str(priority),
            "WOOLY_AUTOSTART": "0",
        }
        if not self.setup.on_gpu:
            environment |= {key: value for key, value in CPU_ENVIRONMENT.items() if key != "VLLM_CPU_KVCACHE_SPACE"}
            environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        child = self.node.launch(name, role, job, **environment)
        commands = {
            "tokens": {"batch": 1, "prompt": scale.prompt, "room": scale.max_len - scale.prompt - 1},
            "load": {"concurrency": scale.concurrency, "prompt": scale.long_prompt, "tokens": 1},
            "requests": {"prompt": scale.prompt, "tokens": scale.answer},
        }
        return self._add(child, commands)

    def start(self) -> None:
        """Wait until all workloads that were started are ready, one after the other, and are gated by the arbiter."""
        for tenant in self.tenants:
            tenant.child.wait("imported", START_TIMEOUT_S)
        for tenant in self.tenants:
            tenant.child.ask("start", "ready", START_TIMEOUT_S)
        if self.way.arbiter:
            for tenant in self.tenants:
                self.check_gated(tenant.child.name)

    def check_gated(self, name: str) -> None:
        """Raise :class:`ChildError` if the arbiter, which may just be starting, does not hold a workload."""

        def gated() -> bool:
            found = self.row(name).compute
            return found is not None and found.gated

        try:
            wait_until(gated, "the arbiter", ARBITER_TIMEOUT_S)
        except TimeoutError:
            found = self.row(name).compute
            reason = "the store has no arbiter" if found is None else found.ungated
            raise ChildError(f"{name} is never held: {reason}") from None

    def row(self, name: str) -> WorkloadStatus:
        """Return what the store knows of a workload."""
        with self.node.session() as session:
            return next(one for one in session.status().workloads if one.name == name)

    def set_share(self, name: str, percent: float) -> None:
        """Set the share of a workload that runs."""
        with self.node.session() as session:
            session.workloads.set_share(name, percent)

    def end(self) -> None:
        """End all workloads."""
        self.node.end_all()
        self.tenants.clear()

    def _environment(self, priority: int) -> dict[str, str]:
        found = dict(self.environment)
        if self.way.percent and priority:
            found["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(self.way.percent)
        return found

    def _add(self, child: Child, commands: dict[str, dict[str, Any]]) -> Tenant:
        self.tenants.append(Tenant(child, commands))
        return self.tenants[-1]


@dataclass(eq=False)
class Tenant:
    """A workload, and what it is told beside the time of a window, by command."""

    child: Child
    commands: dict[str, dict[str, Any]]

    def tell(self, command: str, **given: Any) -> None:
        """Send a command."""
        self.child.tell(f"{command} {json.dumps({**self.commands.get(command, {}), **given})}")

    def ask(self, command: str, timeout_s: float = 300, **given: Any) -> dict[str, Any]:
        """Send a command, and return its answer."""
        self.tell(command, **given)
        return self.child.wait(command, timeout_s)


Asked = tuple[Tenant, str, dict[str, Any]]
"""A workload, a command, and its arguments beside the window."""


def window(seconds: float, asked: Sequence[Asked], timeout_s: float = 180.0) -> list[dict[str, Any]]:
    """Run commands of several workloads in the same window of time; return their answers, in order."""
    loaded = any(command == "load" for _, command, _ in asked)
    at = time.monotonic() + LEAD_S + (HEAD_START_S if loaded else 0)
    for tenant, command, given in asked:
        span = {} if command == "requests" else {"seconds": seconds}
        lead = {"lead": HEAD_START_S} if command == "load" else {}
        tenant.tell(command, at=at, **span, **lead, **given)
    return [tenant.child.wait(command, seconds + timeout_s) for tenant, command, _ in asked]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times of a Poisson process: ``rate`` a second, within so many seconds. Equal for equal seeds."""
    chance = random.Random(seed)
    found = []
    at = chance.expovariate(rate)
    while at < seconds:
        found.append(round(at, 6))
        at += chance.expovariate(rate)
    return found
