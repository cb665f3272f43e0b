"""`make demo`: two vLLM servers share one copy of a model's weights and give the same answers as stock vLLM.

Starts a temporary store, two servers with `--load-format wooly`, then stock servers one after the other. Sends the same
questions to all of them, and prints which answers are equal, the memory of each server, and load times.

On a CPU the model is SmolLM2-135M-Instruct. Stock vLLM packs CPU weights into private handles and computes with other
kernels, so the reference is stock vLLM with wooly's kernels (`WOOLY_CPU_DISPATCH=1`); stock vLLM as shipped is reported
beside it. With an NVIDIA GPU the model is Llama-shaped, random, 8.8 GB, because nothing is downloaded: its answers are
noise, and equal. `--model` selects a real one.

The last line is a JSON object. Exit codes: 0 success, 1 failure (with the `reason`), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from support.models import large_llama as llama
from support.models.cache import made_once
from support.models.random_weights import write_tokenizer
from support.models.smollm2 import smollm2
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Answer, Server

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import MIB
from benchmarks.harness.gpu import used_mib
from benchmarks.scenarios import demo_frame as frame
from benchmarks.scenarios.demo_frame import DemoError, TemporaryStore
from shared_store.base.status import Status
from shared_store.memory.cuda.driver import visible_gpus

# "Answer in ..." because otherwise the first token is a near tie for this model ("The" or "L'", 0.1 nats apart), which
# depends on the rounding of a CPU's attention kernel.
QUESTIONS = (
    "What is the capital of France? Answer in one short sentence.",
    "Name the three primary colours.",
    "Write one sentence about the sea.",
)
START_TIMEOUT_S = 240.0
SHIPPED = "stock as shipped"
LARGE = ("--layers", "20", "--vocabulary", "320")  # one token per byte, and special tokens: any answer is text
_LOADED = re.compile(r"wooly: (?:attached|loaded in (?P<loaded>[\d.]+) s and published) \S+ in (?P<total>[\d.]+) s")
"""Log line of wooly's loader, for the table only."""


@dataclass(frozen=True)
class Run:
    """A server's answers, load time (for the table), and memory (bytes)."""

    name: str
    answers: tuple[Answer, ...]
    load: str
    memory: int
    private_bytes: int
    mapped_bytes: int


@dataclass(frozen=True)
class Machine:
    """Settings for a kind of device.

    Attributes:
        title: Name of the model in the table.
        make: Function that makes the model in a directory of checkpoints.
        arguments: Arguments of every server.
        environment: Environment of every server.
        references: Environments of the stock servers, by name. Answers must equal those of the first.
        memory: Heading of the memory column.
    """

    title: str
    make: Callable[[Path], Path]
    arguments: tuple[str, ...]
    environment: dict[str, str]
    references: dict[str, dict[str, str]]
    memory: str


def _large_llama(cache: Path) -> Path:
    def make(directory: Path) -> None:
        llama.run("make", str(directory), *LARGE)
        write_tokenizer(directory)

    return made_once(cache, "random-llama-large", make)


CPU = Machine(
    "SmolLM2-135M-Instruct",
    smollm2,
    SMALL_ARGUMENTS,
    CPU_ENVIRONMENT,
    {"stock, wooly's kernels": {"WOOLY_CPU_DISPATCH": "1"}, SHIPPED: {}},
    "worker's memory (PSS)",
)
GPU = Machine(
    "a random Llama of 8.8 GB",
    _large_llama,
    (*SMALL_ARGUMENTS, "--gpu-memory-utilization", "0.3"),
    {"VLLM_NO_USAGE_STATS": "1"},
    {SHIPPED: {}},
    "GPU memory, store's growth included",
)


class Demo:
    """The steps of the demo, and the directory of its store and logs."""

    def __init__(self, console: Console, directory: Path, machine: Machine, model: str) -> None:
        self.console = console
        self.directory = directory
        self.machine = machine
        self.model = model
        self.store = TemporaryStore(console, directory)

    def play(self) -> dict[str, Any]:
        """Run all steps; return the object of the last line. Raises :class:`DemoError` or :class:`ServerError`."""
        with self.store:
            readers, status = self._shared_servers()
        stock = [
            self._stock_server(name, environment, readers[0].mapped_bytes)
            for name, environment in self.machine.references.items()
        ]
        self._show(readers, stock, status)
        self._check(readers, stock[0], status)
        return {
            "demo": "ok",
            "tokens_equal": True,
            "tokens_equal_stock_kernels": _tokens(readers[0]) == _tokens(stock[-1]),
            "servers": len(readers),
            "resident_bytes": status.totals.resident_bytes,
            "mapped_bytes": status.totals.mapped_bytes,
            "saved_bytes": status.totals.saved_bytes,
        }

    def _shared_servers(self) -> tuple[list[Run], Status]:
        with contextlib.ExitStack() as stack:
            servers, before = [], []
            for number in (1, 2):
                before.append(self._gpu_bytes())
                servers.append(stack.enter_context(self._server(f"wooly {number}", ["--load-format", "wooly"], {})))
                self._wait(servers[-1])
            before.append(self._gpu_bytes())
            answers = [self._ask(server) for server in servers]
            status = msgspec.json.decode(self.store.wooly("status", "--json"), type=Status)
            return [
                self._shared_run(servers[index], answers[index], status, before[index + 1] - before[index])
                for index in range(len(servers))
            ], status

    def _gpu_bytes(self) -> int:
        """Return the GPU memory in use; 0 on a CPU."""
        return used_mib() * MIB if self.machine.memory == GPU.memory else 0

    def _shared_run(self, server: Server, answers: tuple[Answer, ...], status: Status, grown: int) -> Run:
        pids = server.pids()
        clients = [client for client in status.clients if client.pid in pids and client.mapped_bytes]
        if not clients:
            raise DemoError(f"{server.name} loaded private weights instead of mapping the store's\n{server.log_tail()}")
        return Run(
            server.name,
            answers,
            _load_time(server.log.read_text(errors="replace")),
            grown or server.worker_memory({client.pid for client in clients}).total,
            sum(client.private_bytes for client in clients),
            sum(client.mapped_bytes for client in clients),
        )

    def _stock_server(self, name: str, environment: dict[str, str], model_bytes: int) -> Run:
        before = self._gpu_bytes()
        with self._server(name, [], environment) as server:
            self._wait(server)
            grown = self._gpu_bytes() - before
            answers = self._ask(server)
            seconds = server.load_seconds()
            load = "?" if seconds is None else f"load {seconds:.2f}"
            return Run(name, answers, load, grown or server.worker_memory().total, model_bytes, 0)

    def _server(self, name: str, arguments: list[str], environment: dict[str, str]) -> Server:
        self.console.print(f"starting {name}", end=" ", highlight=False)
        log = self.directory / f"{re.sub(r'[^a-z0-9]+', '-', name)}.log"
        environment = {**self.store.environment, **self.machine.environment, **environment}
        return Server(name, self.model, log, arguments=[*self.machine.arguments, *arguments], environment=environment)

    def _wait(self, server: Server) -> None:
        with self.console.status(f"{server.name}: waiting for its first health check"):
            server.wait_ready(START_TIMEOUT_S)
        self.console.print(f"- ready after {server.start_s:.0f} s", highlight=False)

    def _ask(self, server: Server) -> tuple[Answer, ...]:
        answers = []
        for question in QUESTIONS:
            answer = server.ask(question)
            answers.append(answer)
            text = " ".join(answer.text.split())
            self.console.print(f"  {server.name}: {question} -> {text!r}", highlight=False, markup=False)
        return tuple(answers)

    def _show(self, readers: list[Run], stock: list[Run], status: Status) -> None:
        table = Table(title=f"{self.machine.title}: {len(readers)} servers on one copy of the weights")
        table.add_column("server")
        for heading in ("own weights", "mapped weights", self.machine.memory, "seconds"):
            table.add_column(heading, justify="right")
        for other in stock:
            table.add_column(f"tokens = {other.name}")
        for run in (*reversed(stock), *readers):
            same = [_yes(_tokens(run) == _tokens(other)) for other in stock]
            sizes = [_mib(size) for size in (run.private_bytes, run.mapped_bytes, run.memory)]
            table.add_row(run.name, *sizes, run.load, *same)
        self.console.print(table)
        totals = status.totals
        self.console.print(
            f"in the store: resident {_mib(totals.resident_bytes)}, mapped {_mib(totals.mapped_bytes)}, "
            f"saved {_mib(totals.saved_bytes)}",
            highlight=False,
        )

    def _check(self, readers: list[Run], stock: Run, status: Status) -> None:
        for run in readers:
            if _tokens(run) != _tokens(stock):
                raise DemoError(f"{run.name} generated other tokens than {stock.name}")
        if status.counters.publishes != 1:
            raise DemoError("the second server loaded and published instead of attaching")
        if status.totals.saved_bytes <= 0:
            raise DemoError("two servers run, but the store reports no saved memory")


def _tokens(run: Run) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in run.answers]


def _load_time(log: str) -> str:
    """Return the seconds that wooly's loader logged, for the table."""
    found = _LOADED.search(log)
    if found is None:
        return "?"
    loaded, total = found["loaded"], float(found["total"])
    return f"attach {total:.3f}" if loaded is None else f"load {loaded}, publish {total - float(loaded):.3f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def run() -> int:
    """Run the demo; return the exit code."""
    options = parser(__doc__)
    frame.add_options(options)
    options.add_argument("--model", help="model for `vllm serve`, a directory or a name, instead of that checkpoint")
    arguments = options.parse_args()

    def play(console: Console, directory: Path) -> dict[str, Any]:
        machine = GPU if visible_gpus() else CPU
        if arguments.model:
            machine = dataclasses.replace(machine, title=arguments.model)
        else:
            console.print(f"preparing {machine.title} (cached after the first run)")
        model = arguments.model or str(machine.make(arguments.cache))
        return Demo(console, directory, machine, model).play()

    return frame.run(arguments, play)


def main() -> None:
    """Run the demo."""
    sys.exit(run())
