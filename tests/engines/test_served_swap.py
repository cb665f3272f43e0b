"""A served engine under a budget: swapped while it answers, back when a request arrives, and what it answers meanwhile.

The API server, the engine core and its loop are processes and threads as in production.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import CPU_SETTINGS, SHARING, EngineProcess, status_of
from support.plain_workload import PlainWorkload
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Server
from support.stores import KeptStore
from support.waiting import wait_until

from shared_store.base.errors import DeclinedError
from shared_store.base.workloads import WorkloadStatus
from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MIB = 1 << 20
BLOCKS = 128
BUDGET = 40 * MIB
"""An engine has 16 MiB of KV cache and 5 MiB of weights: one fits beside a workload of 24 MiB, two do not."""

ARGUMENTS = (
    *SMALL_ARGUMENTS,
    *("--load-format", "wooly", "--model-loader-extra-config", '{"fallback": false, "workload": "served"}'),
    *("--num-gpu-blocks-override", str(BLOCKS)),
)
PROMPT = [5, 9, 100, 7]


@pytest.fixture(scope="module")
def store(module_runtime_dir: Path, tmp_path_factory: Any) -> Iterator[Path]:
    """A store that lets all workloads together use `BUDGET`, and swaps at once."""
    swap = tmp_path_factory.mktemp("swap")
    process = KeptStore(
        module_runtime_dir,
        budget={"cpu": BUDGET},
        vram_reserve=0,
        min_resident_s=0.1,
        swap_dir=str(swap),
    )
    process.start()
    yield module_runtime_dir
    process.clean_up()


@pytest.fixture(scope="module")
def served(store: Path, checkpoint: Any, tmp_path_factory: Any) -> Iterator[Server]:
    """A server whose dispatch of utilities is open to tests."""
    environment = {**CPU_ENVIRONMENT, **CPU_SETTINGS, "WOOLY_RUNTIME_DIR": str(store), "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("served") / "log"
    with Server("served", str(checkpoint("llama")), log, arguments=ARGUMENTS, environment=environment) as server:
        server.wait_ready(600)
        yield server


@pytest.fixture(scope="module")
def undisturbed(served: Server) -> tuple[int, ...]:
    """The tokens of the prompt."""
    return served.complete(PROMPT, max_tokens=400).token_ids


def row(store: Path) -> WorkloadStatus:
    """Return what the store knows of the server."""
    return next(it for it in status_of(store).workloads if it.name == "served")


def swap(store: Path, *, out: bool) -> None:
    with Session.connect(store, autostart=False) as session:
        session.workloads.move("served", out=out)


def asked(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Return status and JSON of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server._port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None


class Asking:
    """A completion in a thread."""

    def __init__(self, server: Server) -> None:
        self.tokens: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._ask, args=(server,))
        self._thread.start()

    def _ask(self, server: Server) -> None:
        self.tokens = server.complete(PROMPT, max_tokens=400).token_ids

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> tuple[int, ...]:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.tokens


@pytest.fixture
def full(store: Path, served: Server) -> Iterator[Callable[..., PlainWorkload]]:
    """Return a function that swaps the server out, and gives its memory to a workload that never leaves."""
    assert served
    made: list[PlainWorkload] = []

    def take(mib: int = 24) -> PlainWorkload:
        swap(store, out=True)
        made.append(PlainWorkload(store, "owner", device="cpu", needs=mib, swap=False))
        made[-1].join("swapped", 0)
        made[-1].enter()
        return made[-1]

    yield take
    for workload in made:
        workload.close()
    wait_until(lambda: not row(store).blocked_by, "the server not to wait for memory")


def test_a_server_is_a_workload_with_its_memory(store: Path, served: Server) -> None:
    assert served
    wait_until(lambda: row(store).state == "resident", "the server to report that it is resident")
    found = row(store)
    (memory,) = found.memory
    assert (found.kind, found.priority, found.swappable, found.refusal) == ("vllm", 0, True, "")
    assert memory.device == "cpu"
    assert memory.private == memory.needs >= 16 * MIB
    assert memory.shared > 4 * MIB


def test_a_request_that_runs_is_swapped_and_ends_with_the_same_tokens(
    store: Path, served: Server, undisturbed: tuple[int, ...]
) -> None:
    interrupted = 0
    while interrupted < 3:
        asking = Asking(served)
        wait_until(lambda asking=asking: row(store).running or not asking.waits, "the request to run, or to have ended")
        while interrupted < 3 and asking.waits:
            before = row(store)
            with contextlib.suppress(DeclinedError):  # it is returning already
                swap(store, out=True)
            interrupted += before.running > 0 and asking.waits and row(store).swaps > before.swaps
        assert asking.join() == undisturbed


def test_a_swapped_server_answers_what_needs_no_device_and_a_request_brings_it_back(
    store: Path, served: Server, undisturbed: tuple[int, ...]
) -> None:
    swap(store, out=True)
    (memory,) = row(store).memory
    assert (row(store).state, memory.private, memory.shared) == ("swapped", memory.stays, 0)
    assert asked(served, "GET", "/health") == (200, None)
    assert asked(served, "GET", "/is_sleeping") == (200, {"is_sleeping": False})
    assert asked(served, "POST", "/reset_prefix_cache")[0] == 200
    assert asked(served, "GET", "/v1/models")[0] == 200
    assert row(store).state == "swapped"
    assert served.complete(PROMPT, max_tokens=400).token_ids == undisturbed
    wait_until(lambda: row(store).state == "resident", "the server to report that it is resident")


def test_a_call_that_needs_the_devices_brings_a_swapped_server_back(store: Path, served: Server) -> None:
    swap(store, out=True)
    assert asked(served, "POST", "/reset_mm_cache")[0] == 200
    wait_until(lambda: row(store).state == "resident", "the server to report that it is resident")


def test_a_request_waits_without_memory_and_says_whose_it_is(
    store: Path, served: Server, undisturbed: tuple[int, ...], full: Callable[..., PlainWorkload]
) -> None:
    owner = full()
    asking = Asking(served)
    wait_until(lambda: row(store).blocked_by == ("owner",), "the server to wait for memory of its owner")
    assert asked(served, "GET", "/health") == (200, None)
    assert asked(served, "GET", "/is_sleeping") == (200, {"is_sleeping": False})
    assert (row(store).state, row(store).waiting) == ("swapped", 1)
    assert asking.waits
    owner.close()
    assert asking.join() == undisturbed


def test_a_request_that_is_aborted_while_it_waits_for_memory_ends_the_wait(
    store: Path, served: Server, undisturbed: tuple[int, ...], full: Callable[..., PlainWorkload]
) -> None:
    owner = full()
    connection = http.client.HTTPConnection("127.0.0.1", served._port, timeout=60)
    request = {"model": "model", "prompt": PROMPT, "max_tokens": 8, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(request), {"content-type": "application/json"})
    wait_until(lambda: row(store).blocked_by == ("owner",), "the server to wait for memory")
    connection.close()
    wait_until(lambda: not row(store).blocked_by, "the server to wait no more")
    assert (row(store).state, row(store).waiting) == ("swapped", 0)
    owner.close()
    assert served.complete(PROMPT, max_tokens=400).token_ids == undisturbed


@pytest.fixture
def another(store: Path, checkpoint: Any) -> Iterator[Callable[..., EngineProcess]]:
    """Return a function that starts an engine of another model, with as much memory."""
    started: list[EngineProcess] = []

    def start(**environment: str) -> EngineProcess:
        settings = {"max_model_len": 512, "num_gpu_blocks_override": BLOCKS}
        job = {"models": [str(checkpoint("qwen2"))], **SHARING, "settings": settings, "hold": True}
        started.append(EngineProcess(store, job, **environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_an_engine_starts_by_taking_memory_of_an_idle_one_and_both_answer_in_turn(
    store: Path, served: Server, undisturbed: tuple[int, ...], another: Callable[..., EngineProcess]
) -> None:
    served.complete(PROMPT, max_tokens=8)
    second = another(WOOLY_WORKLOAD="second")
    first_answer = second.wait("answered")["tokens"]
    assert row(store).state == "swapped"
    assert served.complete(PROMPT, max_tokens=400).token_ids == undisturbed
    states = {it.name: it.state for it in status_of(store).workloads}
    assert (states["served"], states["second"]) == ("resident", "swapped")
    second.tell("go on")
    assert second.wait("answered again")["tokens"] == first_answer
    assert second.finish() == 0
    assert status_of(store).counters.fallbacks == 0


def test_a_start_without_memory_fails_in_time_and_says_whose_it_is(
    full: Callable[..., PlainWorkload], another: Callable[..., EngineProcess]
) -> None:
    full(38)
    process = another(WOOLY_START_TIMEOUT="3s")
    error = process.wait("failed")["error"]
    assert "TimedOutError" in error
    assert "owner" in error
    assert any("waiting for memory to start" in line for line in process.log)
    assert process.finish() != 0
