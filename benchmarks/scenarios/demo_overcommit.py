"""`make demo-overcommit`: three chat models in the memory of one and a half.

Starts a temporary store whose budget (`wooly serve --budget`) is one and a half times what one server needs, and three
vLLM servers, of models without a common tensor. Each answers before the next one starts, which takes the memory of one
before it. Then all are asked in turn, then at the same time, and at last a long answer of one is interrupted by a
server of higher priority. Every answer must have the tokens that the server generated before it was swapped out for the
first time.

Shows the workloads and their states while that goes on (at a terminal; elsewhere each change of a state is a line), and
then what it took. On a CPU the models are SmolLM2-135M-Instruct and two relatives of it. With an NVIDIA GPU they are
Llama-shaped, random, 8.8 GB each: their answers are noise, and equal.

The last line is a JSON object. Exit codes: 0 success, 1 failure (with the `reason`), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from support.models import large_llama as llama
from support.models.cache import made_once
from support.models.random_weights import write_tokenizer
from support.models.smollm2 import relative, smollm2
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Answer, Server

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import GIB, MIB
from benchmarks.scenarios import demo_frame as frame
from benchmarks.scenarios.demo import LARGE, QUESTIONS, START_TIMEOUT_S
from benchmarks.scenarios.demo_frame import DemoError, TemporaryStore
from shared_store.base.errors import WoolyError
from shared_store.base.status import Status
from shared_store.base.workload_states import WorkloadState
from shared_store.cli.render import size
from shared_store.cli.workload_views import activity, state, totals
from shared_store.client.session import Session
from shared_store.memory.cuda.driver import visible_gpus

LONG = "Tell a story about a small boat."
LONG_TOKENS = 160
ROUNDS = 3
LOOK_S = 0.2
STYLES = {"resident": "green", "swapped": "dim", "returning": "cyan", "leaving": "yellow", "draining": "yellow"}
SHARE = 1.5
"""Budget by the memory of one server."""


@dataclass(frozen=True)
class Machine:
    """Settings for a kind of device.

    Attributes:
        device: whose memory is shared.
        reserve: bytes of it that stay free.
        private: bytes of a server beside its weights.
        models: functions that make the models in a directory of checkpoints, by the server's name.
        arguments: of every server.
        environment: of every server.
    """

    device: str
    reserve: int
    private: int
    models: dict[str, Callable[[Path], Path]]
    arguments: tuple[str, ...]
    environment: dict[str, str]


def _large_llama(cache: Path, seed: int) -> Path:
    def make(directory: Path) -> None:
        llama.run("make", str(directory), *LARGE, "--seed", str(seed))
        write_tokenizer(directory)

    return made_once(cache, "random-llama-large" if not seed else f"random-llama-large-{seed}", make)


KV = {"cpu": 256 * MIB, "gpu": 8 * GIB}
"""Bytes of each server's KV cache."""
COMMON = (*SMALL_ARGUMENTS, "--no-enable-prefix-caching", "--load-format", "wooly")
"""Without prefix caching an answer depends on nothing but its question."""
CPU = Machine(
    "cpu",
    64 * MIB,
    KV["cpu"],
    {"alpha": smollm2, "beta": partial(relative, seed=1), "gamma": partial(relative, seed=2)},
    (*COMMON, "--kv-cache-memory-bytes", str(KV["cpu"])),
    {name: value for name, value in CPU_ENVIRONMENT.items() if name not in frame.USERS},  # it overrides the option
)
PRIORITIES = {"alpha": 0, "beta": 1, "gamma": 1}


def on_gpu(uuid: str) -> Machine:
    """Return the settings for a GPU."""
    return Machine(
        uuid,
        2 * GIB,
        KV["gpu"] + 4 * GIB,  # context, activations, and what a swapped server keeps
        {name: partial(_large_llama, seed=seed) for seed, name in enumerate(PRIORITIES)},
        (*COMMON, "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(KV["gpu"])),
        {"VLLM_NO_USAGE_STATS": "1"},
    )


@dataclass
class Watcher:
    """Looks at the store again and again, in a thread, and draws what it sees.

    Attributes:
        runtime_dir: of the store.
        device: whose memory is shared.
        draw: called with each status.
        say: called with a line for each change of a state.
        highest: most bytes that the workloads had together.
        left: by name, how often a workload left.
        error: why it ended, if it did.
    """

    runtime_dir: Path
    device: str
    draw: Callable[[Status], None]
    say: Callable[[str], None]
    highest: int = 0
    left: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None
    _states: dict[str, str] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look until the block ends."""
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if self.error is not None:
            raise self.error

    def _run(self, ended: threading.Event) -> None:
        try:
            with Session.connect(self.runtime_dir, name="demo", autostart=False) as session:
                while not ended.wait(LOOK_S):
                    self._look(session.status())
        except (WoolyError, OSError) as error:  # raised in the main thread
            self.error = error

    def _look(self, status: Status) -> None:
        self.draw(status)
        self.highest = max(self.highest, _used(status, self.device))
        for one in status.workloads:
            before = self._states.get(one.name)
            self._states[one.name] = one.state
            self.left[one.name] = one.swaps
            if before is not None and before != one.state:
                waits = f", waits for {', '.join(one.blocked_by)}" if one.blocked_by else ""
                self.say(f"{time.monotonic() - self._began:7.1f} s  {one.name}: {before} -> {one.state}{waits}")


@dataclass
class Asked:
    """A server, its priority, what it answered before it was swapped out, and how long answers took.

    Attributes:
        server: the server.
        priority: of it.
        answers: by question.
        before_s: seconds of the first question, before.
        first_s: seconds of the first question of each later turn, when it may have had to return.
        compared: answers that were equal.
    """

    server: Server
    priority: int
    answers: dict[str, Answer] = field(default_factory=dict)
    before_s: float = 0.0
    first_s: list[float] = field(default_factory=list)
    compared: int = 0

    def ask(self, question: str) -> tuple[Answer, float]:
        """Return an answer, and the seconds that it took."""
        began = time.monotonic()
        if question == LONG:
            answer = self.server.ask(question, max_tokens=LONG_TOKENS, timeout_s=240, ignore_eos=True)
        else:
            answer = self.server.ask(question, timeout_s=240)
        return answer, time.monotonic() - began

    def learn(self) -> None:
        """Ask everything for the first time."""
        for question in (*QUESTIONS, LONG):
            self.answers[question], took = self.ask(question)
            self.before_s = self.before_s or took

    def compare(self, questions: Sequence[str] = QUESTIONS) -> None:
        """Ask again. Raises :class:`DemoError` if an answer has other tokens."""
        for number, question in enumerate(questions):
            answer, took = self.ask(question)
            if number == 0 and question != LONG:
                self.first_s.append(took)
            if answer.token_ids != self.answers[question].token_ids:
                raise DemoError(
                    f"{self.server.name} answered {question!r} otherwise than before it was swapped out: "
                    f"{answer.text!r} instead of {self.answers[question].text!r}"
                )
            self.compared += 1


class Demo:
    """The steps of the demo."""

    def __init__(self, console: Console, directory: Path, machine: Machine, models: dict[str, Path]) -> None:
        self.console = console
        self.directory = directory
        self.machine = machine
        self.models = models
        self.one = machine.private + max(map(_weights, models.values()))
        self.budget = int(SHARE * self.one) + machine.reserve
        self.servers: dict[str, Asked] = {}
        self._live: Live | None = None

    def play(self) -> dict[str, Any]:
        """Run all steps; return the object of the last line. Raises :class:`DemoError`, or an error of a server."""
        machine = self.machine
        options = ("--budget", f"{machine.device}={self.budget}", "--vram-reserve", str(machine.reserve))
        swap = self.directory / "swap"
        swap.mkdir(mode=0o700)
        store = TemporaryStore(self.console, self.directory, *options, "--swap-dir", str(swap))
        with store, contextlib.ExitStack() as stack:
            if self.console.is_terminal and not self.console.quiet:
                self._live = stack.enter_context(Live(console=self.console, auto_refresh=False, transient=True))
            watcher = Watcher(store.runtime_dir, machine.device, self._draw, self._say)
            with watcher.watching(), contextlib.ExitStack() as servers:
                for name in self.models:
                    self._start(name, store, servers)
                began = time.monotonic()
                self._in_turn()
                self._all_at_once()
                interrupted = self._interrupt(watcher)
                took_s = time.monotonic() - began
        self._show(watcher, took_s)
        if not all(watcher.left.get(name) for name in self.servers):
            raise DemoError(f"not every server was swapped out: {watcher.left}")
        if watcher.highest > self.budget - machine.reserve:
            raise DemoError(f"the servers had {size(watcher.highest)} together, beyond the budget")
        return {
            "demo": "ok",
            "tokens_equal": True,
            "answers_compared": sum(one.compared for one in self.servers.values()),
            "long_answer_interrupted": interrupted,
            "servers": len(self.servers),
            "one_server_bytes": self.one,
            "budget_bytes": self.budget,
            "highest_bytes": watcher.highest,
            "swaps": sum(watcher.left.values()),
            "seconds": round(took_s, 1),
            "first_answer_s": {name: round(statistics.median(one.first_s), 3) for name, one in self.servers.items()},
            "first_answer_before_s": {name: round(one.before_s, 3) for name, one in self.servers.items()},
        }

    def _start(self, name: str, store: TemporaryStore, stack: contextlib.ExitStack) -> None:
        self._say(f"starting {name}")
        settings = {"workload": name, "priority": PRIORITIES[name]}
        server = Server(
            name,
            str(self.models[name]),
            self.directory / f"{name}.log",
            arguments=[*self.machine.arguments, "--model-loader-extra-config", json.dumps(settings)],
            environment={**store.environment, **self.machine.environment},
        )
        stack.enter_context(server)
        server.wait_ready(START_TIMEOUT_S)
        self._say(f"{name} is ready after {server.start_s:.0f} s")
        asked = self.servers[name] = Asked(server, PRIORITIES[name])
        asked.learn()
        for question in QUESTIONS:
            self._say(f"  {name}: {question} -> {' '.join(asked.answers[question].text.split())!r}")

    def _in_turn(self) -> None:
        for number in range(ROUNDS):
            self._say(f"asking each in turn, {number + 1} of {ROUNDS}")
            for asked in self.servers.values():
                asked.compare()

    def _all_at_once(self) -> None:
        self._say("asking all at the same time")
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for done in [pool.submit(asked.compare) for asked in self.servers.values()]:
                done.result()

    def _interrupt(self, watcher: Watcher) -> bool:
        """Ask the P0 while another one generates a long answer; return whether that one left meanwhile."""
        first, second, *_ = self.servers
        self._say(f"asking {first} (P{PRIORITIES[first]}) while {second} (P{PRIORITIES[second]}) writes")
        with ThreadPoolExecutor(1) as pool:
            writes = pool.submit(self.servers[second].compare, [LONG])
            with Session.connect(watcher.runtime_dir, name="demo", autostart=False) as session:
                while not writes.done() and not _runs(session.status(), second):
                    time.sleep(0.02)
            before = watcher.left[second]
            self.servers[first].compare(QUESTIONS[:1])
            writes.result()
        time.sleep(2 * LOOK_S)  # the watcher looks again
        return watcher.left[second] > before

    def _draw(self, status: Status) -> None:
        if self._live is None:
            return
        table = Table(title=self._title())
        for heading in ("server", "priority", "state", "memory", "away", "requests", "swaps", "waits for"):
            table.add_column(heading)
        for one in status.workloads:
            private, shared, away = totals(one)
            row = (one.name, f"P{one.priority}", state(one), size(private + shared), size(away), activity(one))
            table.add_row(*row, str(one.swaps), ", ".join(one.blocked_by) or "-", style=STYLES.get(one.state, ""))
        used = [size(_used(status, self.machine.device)), size(self.budget)]
        self._live.update(Group(table, Text(f"{used[0]} of {used[1]}")), refresh=True)

    def _title(self) -> str:
        return f"{len(self.models)} servers, each of {size(self.one)}, in {size(self.budget)}"

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _show(self, watcher: Watcher, took_s: float) -> None:
        table = Table(title=self._title())
        for heading in ("server", "priority", "swapped out", "answers equal", "first answer before, s", "later, s"):
            table.add_column(heading, justify="left" if heading == "server" else "right")
        for name, asked in self.servers.items():
            later = f"{statistics.median(asked.first_s):.2f} (at most {max(asked.first_s):.2f})"
            equal = f"{asked.compared} of {asked.compared}"
            table.add_row(
                name, f"P{asked.priority}", str(watcher.left.get(name, 0)), equal, f"{asked.before_s:.2f}", later
            )
        self.console.print(table)
        self._say(f"most memory at once: {size(watcher.highest)}; {took_s:.0f} s since all servers were ready")


def _used(status: Status, device: str) -> int:
    """Return the bytes that workloads have together: their own, and segments."""
    private = sum(memory.private for one in status.workloads for memory in one.memory if memory.device == device)
    return private + sum(one.resident_bytes for one in status.devices if one.id == device)


def _weights(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _runs(status: Status, name: str) -> bool:
    """Whether a workload generates."""
    return any(
        one.name == name and one.running and one.state == WorkloadState.RESIDENT.value for one in status.workloads
    )


def run() -> int:
    """Run the demo; return the exit code."""
    options = parser(__doc__)
    frame.add_options(options)
    arguments = options.parse_args()

    def play(console: Console, directory: Path) -> dict[str, Any]:
        gpus = visible_gpus()
        machine = on_gpu(min(gpus, key=gpus.__getitem__)) if gpus else CPU
        console.print("preparing the models (cached after the first run)")
        models = {name: make(arguments.cache) for name, make in machine.models.items()}
        return Demo(console, directory, machine, models).play()

    return frame.run(arguments, play)


def main() -> None:
    """Run the demo."""
    sys.exit(run())
