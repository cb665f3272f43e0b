"""Parts ``mix_*`` of the benchmark ``overcommit``: requests to four models that do not fit together, by several ways.

Every way gets the same arrivals: a Poisson process for each model.

mix_wooly     all four servers, swapped by wooly; priorities as in :data:`PRIORITIES`.
mix_fits      stock: as many servers as fit, the important models first. Requests to the others are not answered.
mix_sleep     stock: all four with sleep mode, of which a script keeps as many awake as fit, in the order of requests.
mix_small_kv  stock: all four, with a KV cache that lets them fit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.servers import Server, ServerError

from benchmarks.harness.figures import GIB, MIB, Figures, percentile
from benchmarks.harness.node import Node
from benchmarks.harness.processes import ChildError
from benchmarks.scenarios.overcommit_setup import START_TIMEOUT_S, Setup, prompt

PRIORITIES = (0, 1, 1, 3)
"""Of the four models."""

CARD_BYTES = 81_559 * MIB
"""Memory of an H100 with 80 GB: a larger card is used up to there."""

PROMPT, TOKENS = 256, 128
SMALL_KV = 6 * GIB
CLIENTS = 512
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Arrival:
    """A request: seconds since the start, the model, and a number from which its prompt is made."""

    at: float
    model: int
    number: int


@dataclass
class Outcome:
    """What became of a request: seconds to the first token and to the last one, and the number of tokens."""

    model: int
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0


@dataclass
class _Row:
    """The servers of a way, and how a request is let to one.

    Attributes:
        servers: by the number of the model.
        ready: context of each request, which waits until the server may get it.
        facts: what the result says about the way.
    """

    servers: dict[int, Server]
    ready: Callable[[int], contextlib.AbstractContextManager[None]] = lambda _model: contextlib.nullcontext()
    facts: dict[str, Any] = field(default_factory=dict)


def arrivals(setup: Setup, seed: int = 1) -> list[Arrival]:
    """Return the requests of a trace, in order."""
    chance = random.Random(seed)
    found = []
    for model in range(len(PRIORITIES)):
        at = chance.expovariate(setup.rate)
        while at < setup.seconds:
            found.append((at, model))
            at += chance.expovariate(setup.rate)
    return [Arrival(at, model, number) for number, (at, model) in enumerate(sorted(found))]


def mix_wooly(setup: Setup) -> Figures:
    """Let wooly swap the servers."""
    budget = _card(setup)
    with setup.node(budget) as node, contextlib.ExitStack() as stack:
        row = _Row({})
        for model, path in enumerate(_models(setup)):
            priority = PRIORITIES[model]
            server = setup.server(node, f"model-{model}", path, setup.scale.large_kv, priority=priority)
            row.servers[model] = stack.enter_context(server)
            if not setup.on_gpu:  # elsewhere they start at the same time, and take memory in turn
                server.wait_ready(START_TIMEOUT_S)
        for server in row.servers.values():
            _answers(server)
        before = _swaps(node)
        return _measured(setup, "wooly", row, lambda: {"swaps": _swaps(node) - before})


def _swaps(node: Node) -> int:
    return sum(one.swaps for one in node.status().workloads)


def mix_fits(setup: Setup) -> Figures:
    """Run as many stock servers as fit with the same KV cache."""
    with Node() as node, contextlib.ExitStack() as stack:
        row = _Row({})
        before = setup.used()
        one = 0
        for model, path in enumerate(_models(setup)):
            if row.servers and _card(setup) < (len(row.servers) + 1) * one:
                break
            server = setup.server(node, f"model-{model}", path, setup.scale.large_kv, wooly=False)
            try:
                row.servers[model] = _ready(server, stack)
            except ServerError as error:
                if not row.servers:
                    raise
                print(f"mix_fits: {len(row.servers)} servers fit: {str(error).partition(chr(10))[0]}", flush=True)
                break
            one = one or (setup.used() - before if setup.on_gpu else setup.awake(setup.scale.large_kv))
        row.facts["server_bytes"] = one
        return _measured(setup, "fits", row)


def mix_small_kv(setup: Setup) -> Figures:
    """Run all four stock servers, each with a smaller KV cache."""
    kv = SMALL_KV if setup.on_gpu else setup.scale.small_kv
    with Node() as node, contextlib.ExitStack() as stack:
        row = _Row({}, facts={"kv_mib": kv // MIB})
        for model, path in enumerate(_models(setup)):
            row.servers[model] = _ready(setup.server(node, f"model-{model}", path, kv, wooly=False), stack)
        return _measured(setup, "small_kv", row)


def mix_sleep(setup: Setup) -> Figures:
    """Run all four stock servers, and let a script wake the one that is asked and put others to sleep."""
    mode = ["--enable-sleep-mode"] if setup.on_gpu else []
    with Node() as node, contextlib.ExitStack() as stack:
        row = _Row({})
        before = setup.used()
        awake = asleep = 0
        for model, path in enumerate(_models(setup)):
            server = setup.server(node, f"model-{model}", path, setup.scale.large_kv, *mode, wooly=False)
            row.servers[model] = _ready(server, stack)
            if not awake and setup.on_gpu:
                awake = setup.used() - before
            if setup.on_gpu:
                _call(server, "/sleep?level=1")
                asleep = asleep or setup.used() - before
        fit = (_card(setup) - len(row.servers) * asleep) // (awake - asleep) if setup.on_gpu else 2
        script = Script(
            row.servers,
            max(1, int(fit)),
            lambda model, path: _call(row.servers[model], path) if setup.on_gpu else time.sleep(0.1),
        )
        for model in range(script.fit):  # each has slept once, so that its host memory is there
            with script.ready(model):
                pass
        row.ready = script.ready
        row.facts |= {"awake_at_once": script.fit, "awake_bytes": awake, "asleep_bytes": asleep}
        return _measured(setup, "sleep", row, lambda: {"swaps": script.swaps})


class Script:
    """Wakes servers in the order of requests; the one that was asked longest ago and has no requests goes to sleep."""

    def __init__(self, models: Iterable[int], fit: int, call: Callable[[int, str], None]) -> None:
        """Begin with all servers asleep.

        Args:
            models: their numbers.
            fit: how many may be awake.
            call: calls a path of a server.
        """
        self.fit = fit
        self.swaps = 0
        self._call = call
        self._changed = threading.Condition()
        self._next = self._served = 0
        self._running = dict.fromkeys(models, 0)
        self._awake: list[int] = []

    @contextlib.contextmanager
    def ready(self, model: int) -> Iterator[None]:
        """Wait until it is this request's turn and its server is awake; the block is the request."""
        with self._changed:
            ticket = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._served == ticket)
            if model not in self._awake and len(self._awake) >= self.fit:
                self._changed.wait_for(lambda: any(not self._running[one] for one in self._awake))
            try:
                self._wake(model)
                self._running[model] += 1
            finally:
                self._served += 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running[model] -= 1
                self._changed.notify_all()

    def _wake(self, model: int) -> None:
        """Wake a server, with the lock held: requests that arrive meanwhile wait for their turn anyway."""
        if model in self._awake:
            self._awake.remove(model)
        else:
            if len(self._awake) >= self.fit:
                victim = next(one for one in self._awake if not self._running[one])
                self._awake.remove(victim)
                self._call(victim, "/sleep?level=1")
                self.swaps += 1
            self._call(model, "/wake_up")
        self._awake.append(model)


def _models(setup: Setup) -> list[Path]:
    return setup.models(len(PRIORITIES))


def _card(setup: Setup) -> int:
    """Return the bytes that may be used: of two servers and a half on a CPU."""
    if setup.on_gpu:
        return min(setup.total, CARD_BYTES)
    return 5 * setup.awake(setup.scale.large_kv) // 2


def _ready(server: Server, stack: contextlib.ExitStack) -> Server:
    """Wait for a server, which the stack stops, and let it answer once."""
    stack.enter_context(server)
    _answers(server)
    return server


def _answers(server: Server) -> None:
    server.wait_ready(START_TIMEOUT_S)
    server.complete(prompt(0), max_tokens=8, timeout_s=REQUEST_TIMEOUT_S)


def _call(server: Server, path: str) -> None:
    """Call a path without a body. Raises :class:`ChildError`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("POST", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise ChildError(f"{server.name} answered {path} with {answer.status}")


def _measured(setup: Setup, name: str, row: _Row, afterwards: Callable[[], dict[str, Any]] = dict) -> Figures:
    """Send the trace to the servers, and record times to first token by priority."""
    trace = arrivals(setup)
    began = time.monotonic()

    def send(arrival: Arrival) -> Outcome:
        outcome = Outcome(arrival.model)
        time.sleep(max(0.0, began + arrival.at - time.monotonic()))
        if arrival.model in row.servers:
            with row.ready(arrival.model):
                _stream(row.servers[arrival.model], arrival, outcome, began + arrival.at, setup)
        return outcome

    with ThreadPoolExecutor(min(CLIENTS, len(trace))) as pool:
        outcomes = list(pool.map(send, trace))
    took = time.monotonic() - began
    found = Figures()
    put = f"mix_{name}"
    answered = [one for one in outcomes if one.first_s is not None]
    for label, some in _by_priority(answered).items():
        times = sorted(one.first_s for one in some if one.first_s is not None)
        found.raw[f"{put}_{label}_s"] = [round(one, 4) for one in times]
        found.numbers |= {
            f"{put}_{label}_p50_s": round(percentile(times, 50), 4),
            f"{put}_{label}_p99_s": round(percentile(times, 99), 4),
        }
    found.raw[f"{put}_settings"] = {
        "priorities": PRIORITIES,
        "rate": setup.rate,
        "seconds": setup.seconds,
        "prompt": _lengths(setup)[0],
        "tokens": _lengths(setup)[1],
        "kv_mib": setup.scale.large_kv // MIB,
        "memory_bytes": _card(setup),
    }
    found.numbers |= {
        f"{put}_servers": len(row.servers),
        f"{put}_requests": len(outcomes),
        f"{put}_answered": len(answered),
        f"{put}_seconds": round(took, 1),
        f"{put}_tokens_per_s": round(sum(one.tokens for one in answered) / took, 1),
        **{f"{put}_{fact}": value for fact, value in {**row.facts, **afterwards()}.items()},
    }
    return found


def _by_priority(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {"all": outcomes} if outcomes else {}
    for one in outcomes:
        found.setdefault(f"p{PRIORITIES[one.model]}", []).append(one)
    return found


def _lengths(setup: Setup) -> tuple[int, int]:
    return (PROMPT, TOKENS) if setup.on_gpu else (32, 32)


def _stream(server: Server, arrival: Arrival, outcome: Outcome, since: float, setup: Setup) -> None:
    """Send a request, and record when its first and its last token came. Raises :class:`ChildError`."""
    length, tokens = _lengths(setup)
    asked = {
        "model": "model",
        "prompt": prompt(arrival.number, length),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ChildError(f"{server.name} answered a request with {answer.status}: {answer.read()[:200]!r}")
        for line in answer:
            if line.startswith(b"data: {"):
                outcome.tokens += sum(len(one.get("token_ids") or ()) for one in json.loads(line[6:])["choices"])
                if outcome.tokens:
                    outcome.first_s = outcome.first_s or time.monotonic() - since
        outcome.last_s = time.monotonic() - since
    except (OSError, ValueError) as error:
        raise ChildError(f"{server.name} did not answer: {error!r}") from error
    finally:
        connection.close()
    if outcome.tokens != tokens:
        raise ChildError(f"{server.name} answered {outcome.tokens} of {tokens} tokens")
