"""Parts of the benchmark ``overcommit`` with servers of one model: ``ttft``, ``deep`` and ``density``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from support.servers import Server, ServerError

from benchmarks.harness.figures import MIB, Figures
from benchmarks.harness.node import Node
from benchmarks.harness.processes import ChildError
from benchmarks.scenarios.overcommit_setup import (
    START_TIMEOUT_S,
    Owner,
    Setup,
    account,
    answer_s,
    bytes_of,
    prompt,
    row,
    wait_for_state,
)
from shared_store.client.session import Session

STARTING = 6
"""Servers that start at the same time."""

TOKENS = 16

IDLE_S = 4.0
"""Seconds for which a victim has been resident and idle; longer than four times the cost of a swap."""


@dataclass
class _Pair:
    """Two servers of one model; the time to first token of the second one is measured."""

    setup: Setup
    session: Session
    other: Server
    server: Server

    def ask(self, number: int, *states: str) -> float:
        """Return the seconds to the first token. Raises :class:`ChildError` if the server is in another state."""
        state = row(self.session, self.server.name).state
        if state not in states:
            raise ChildError(f"{self.server.name} is {state} before a request, instead of {' or '.join(states)}")
        return answer_s(self.server, number)

    def out(self, *servers: Server) -> None:
        """Swap servers out that are not."""
        for server in servers:
            wait_for_state(self.session, server.name, "resident", "swapped", "checkpointed")
            if row(self.session, server.name).state == "resident":
                self.session.workloads.move(server.name, out=True)

    def back(self, server: Server) -> None:
        """Bring a server back by hand, and wait until the store knows."""
        self.session.workloads.move(server.name, out=False)
        wait_for_state(self.session, server.name, "resident")

    def awake(self) -> list[float]:
        """Measure requests of the server while it is resident."""
        wait_for_state(self.session, self.server.name, "resident")
        answer_s(self.server, 0)
        return [self.ask(number, "resident") for number in range(self.setup.scale.repeats)]


@contextlib.contextmanager
def _pair(setup: Setup, **options: Any) -> Iterator[tuple[_Pair, Node]]:
    kv = setup.scale.small_kv
    with setup.node(setup.room_for(2, kv), **options) as node, contextlib.ExitStack() as stack:
        servers = []
        for name in ("other", "server"):
            servers.append(stack.enter_context(setup.server(node, name, setup.first, kv)))
            if not setup.on_gpu:
                servers[-1].wait_ready(START_TIMEOUT_S)
        for server in servers:
            server.wait_ready(START_TIMEOUT_S)
            server.complete(prompt(0), max_tokens=TOKENS)
        session = stack.enter_context(node.session())
        for server in servers:
            wait_for_state(session, server.name, "resident")
            if not row(session, server.name).swappable:
                raise ChildError(f"{server.name} is never swapped out: {row(session, server.name).refusal}")
        yield _Pair(setup, session, *servers), node


def _put_added(found: Figures, name: str, awake: float, values: list[float]) -> None:
    """Record times to first token, and what they are above that of a resident server; the first one apart, too."""
    found.put(f"{name}_s", values)
    found.put(f"{name}_added_s", [value - awake for value in values])
    found.numbers[f"{name}_first_added_s"] = round(values[0] - awake, 4)


def _measure(setup: Setup, prepare: Callable[[], None], ask: Callable[[int], float]) -> list[float]:
    values = []
    for number in range(setup.scale.repeats + 1):  # the first return, and the others
        prepare()
        values.append(ask(number))
    return values


def ttft(setup: Setup) -> Figures:
    """Measure the time to first token of a swapped server: base awake, base on the host, memory of an idle victim."""
    found = Figures()
    with _pair(setup, min_resident_s=0.1) as (pair, node):
        found.put("ttft_awake_s", pair.awake())
        awake = found.numbers["ttft_awake_s"]

        def base_awake() -> None:
            pair.out(pair.server)
            wait_for_state(pair.session, "other", "resident")

        _put_added(found, "ttft_base_awake", awake, _measure(setup, base_awake, lambda n: pair.ask(n, "swapped")))
        on_host = _measure(setup, lambda: pair.out(pair.server, pair.other), lambda n: pair.ask(n, "swapped"))
        _put_added(found, "ttft_host", awake, on_host)
        pair.out(pair.server, pair.other)
        copies = account(pair.session, setup.device).host_bytes
        found.numbers |= {"ttft_host_copies_bytes": copies, "ttft_host_copies": round(copies / setup.weights(), 3)}
        pair.back(pair.other)
        pair.back(pair.server)
        private, _, stays = bytes_of(row(pair.session, "server"), setup.device)
        pair.out(pair.server)
        free = account(pair.session, setup.device).free_bytes
        if free is None:
            raise ChildError("the store does not know how much of the device is free")
        owner = Owner(node, setup.device, max(0, free - (private - stays) // 2))
        try:
            taken = _measure(setup, lambda: _idle_victim(pair), lambda n: pair.ask(n, "swapped"))
        finally:
            owner.close()
        _put_added(found, "ttft_victim", awake, taken)
        counters = pair.session.status().counters
        found.numbers |= {"ttft_returns": counters.returns, "ttft_fallbacks": counters.fallbacks}
    return found


def _idle_victim(pair: _Pair) -> None:
    """Let the other server be resident, and idle for longer than the least residence."""
    pair.out(pair.server)
    pair.back(pair.other)
    time.sleep(IDLE_S)


def deep(setup: Setup) -> Figures:
    """Measure the time to first token of a server that was taken off its GPU, with the base on the host and awake."""
    if not setup.on_gpu:
        print("deep: only a GPU has it; the steps are tried with swapped servers", flush=True)
    found = Figures()
    off = "checkpointed" if setup.on_gpu else "swapped"
    with _pair(setup, deep_after_s=setup.scale.deep_after_s) as (pair, _):
        found.put("deep_awake_s", pair.awake())
        awake = found.numbers["deep_awake_s"]

        def off_the_gpu() -> None:
            wait_for_state(pair.session, "other", "resident")
            pair.out(pair.server)
            wait_for_state(pair.session, "server", off)

        _put_added(found, "deep_base_awake", awake, _measure(setup, off_the_gpu, lambda n: pair.ask(n, off)))

        def both_off() -> None:
            pair.out(pair.server, pair.other)
            for server in (pair.server, pair.other):
                wait_for_state(pair.session, server.name, off)

        _put_added(found, "deep_host", awake, _measure(setup, both_off, lambda n: pair.ask(n, off)))
        both_off()
        private, _, stays = bytes_of(row(pair.session, "server"), setup.device)
        found.numbers |= {"deep_keeps_bytes": private, "deep_swapped_stays_bytes": stays}
        found.numbers["deep_host_pss_mib"] = round(_host_bytes(pair.server) / MIB)
    return found


def _host_bytes(server: Server) -> int:
    """Return the bytes of host memory that the processes of a server have alone."""
    return sum(server.worker_memory({pid}).anonymous for pid in server.pids())


def density(setup: Setup) -> Figures:
    """Start servers of one model in the memory of four, and let each answer in turn, again and again."""
    found = Figures()
    kv, budget = setup.scale.small_kv, _budget(setup)
    servers: list[Server] = []
    with (
        setup.node(budget, deep_after_s=setup.scale.deep_after_s, start_timeout_s=400.0) as node,
        node.session() as session,
        contextlib.ExitStack() as stack,
    ):
        began = time.monotonic()
        failed: list[str] = []

        def start(number: int) -> Server | None:
            if time.monotonic() - began > setup.budget_s:
                return None
            server = setup.server(node, f"server-{number}", setup.first, kv, eager=True)
            stack.callback(server.stop)
            try:
                server.wait_ready(START_TIMEOUT_S)
                server.complete(prompt(0), max_tokens=TOKENS, timeout_s=300)
            except ServerError as error:
                print(f"density: {error}", flush=True)
                failed.append(server.name)
                return None
            return server

        with ThreadPoolExecutor(STARTING if setup.on_gpu else 1) as pool:
            servers = [one for one in pool.map(start, range(setup.engines)) if one is not None]
        if not servers:
            raise ChildError("no server started")
        found.numbers["density_failed"] = len(failed)
        found.numbers["density_start_s"] = round(time.monotonic() - began, 1)
        right = servers[0].complete(prompt(0), max_tokens=TOKENS, timeout_s=300).token_ids
        answered: dict[str, list[float]] = {}
        equal, counts = 0, 0
        for _ in range(2):
            for server in servers:
                state = row(session, server.name).state
                asked = time.monotonic()
                answer = server.complete(prompt(0), max_tokens=TOKENS, timeout_s=300)
                answered.setdefault(state, []).append(time.monotonic() - asked)
                equal += answer.token_ids == right
                counts += 1
        rows = {one.name: one for one in session.status().workloads}
        away = [bytes_of(rows[one.name], setup.device) for one in servers if rows[one.name].state == "swapped"]
        last = bytes_of(rows[servers[-1].name], setup.device)
        off = [one for one in servers if rows[one.name].state == "checkpointed"]
        host = _host_bytes(off[0] if off else servers[0])
        copies = account(session, setup.device).host_bytes
    for state, values in answered.items():
        found.put(f"density_answer_{state}_s", values)
    stays = max((one[2] for one in [*away, last]), default=0)
    needs = last[0] + last[1]
    found.numbers |= {
        "density_engines": len(servers),
        "density_budget_bytes": budget,
        "density_answers": counts,
        "density_answers_equal": equal,
        "density_checkpointed": len(off),
        "density_resident_bytes": needs,
        "density_stays_bytes": stays,
        "density_host_engine_bytes": host,
        "density_host_copies_bytes": copies,
        "density_host_allows_calculated": max(0, _host_total() - copies) // max(1, host),
    }
    if stays:
        found.numbers["density_without_deep_calculated"] = 1 + (budget - setup.reserve - needs) // stays
    return found


def _budget(setup: Setup) -> int:
    """Return four times the bytes of such an engine with CUDA graphs, as measured before; on a CPU, those of two."""
    return 4 * round(13.7 * 1024) * MIB if setup.on_gpu else setup.weights() + 5 * setup.scale.small_kv // 2


def _host_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
