"""Served engines beside a more important workload, and beside equals: with the store's arbiter.

The API server, the engine core and its loop are processes and threads as in production.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import CPU_SETTINGS, SHARING, EngineProcess, status_of
from support.servers import CPU_ENVIRONMENT, SMALL_ARGUMENTS, Server
from support.stepping import Stepping
from support.stores import KeptStore
from support.waiting import wait_until

from shared_store.base.workloads import ComputeStatus, WorkloadStatus
from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPT = [5, 9, 100, 7]
TOKENS = 400
SOON_S = 60.0
"""For what takes a moment on a machine that is not loaded."""

ARGUMENTS = (
    *SMALL_ARGUMENTS,
    *("--load-format", "wooly", "--num-gpu-blocks-override", "128"),
    *("--model-loader-extra-config", '{"fallback": false, "workload": "served", "priority": 3}'),
)


@pytest.fixture(scope="module")
def store(module_runtime_dir: Path, tmp_path_factory: Any) -> Iterator[Path]:
    process = KeptStore(module_runtime_dir, min_resident_s=0.1, swap_dir=str(tmp_path_factory.mktemp("swap")))
    process.start()
    yield module_runtime_dir
    process.clean_up()


@pytest.fixture(scope="module")
def served(store: Path, checkpoint: Any, tmp_path_factory: Any) -> Iterator[Server]:
    """A server of priority 3 whose dispatch of utilities is open to tests."""
    environment = {**CPU_ENVIRONMENT, **CPU_SETTINGS, "WOOLY_RUNTIME_DIR": str(store), "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("served") / "log"
    with Server("served", str(checkpoint("llama")), log, arguments=ARGUMENTS, environment=environment) as server:
        server.wait_ready(600)
        yield server


@pytest.fixture(scope="module")
def undisturbed(served: Server) -> tuple[int, ...]:
    """The tokens of the prompt."""
    return served.complete(PROMPT, max_tokens=TOKENS).token_ids


@pytest.fixture
def important(store: Path) -> Iterator[Stepping]:
    """A workload of priority 0, without work."""
    with Stepping(store, "important") as workload:
        wait_until(lambda: workload.attached, "the arbiter to take it up", SOON_S)
        yield workload


def row(store: Path, name: str = "served") -> WorkloadStatus:
    """Return what the store knows of a workload."""
    return next(it for it in status_of(store).workloads if it.name == name)


def compute(store: Path, name: str = "served") -> ComputeStatus:
    """Return what a workload computes."""
    found = row(store, name).compute
    assert found is not None
    return found


class Asking:
    """A streamed request. `tokens`: as they arrive."""

    def __init__(self, server: Server) -> None:
        self.tokens: list[int] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        request = {"model": "model", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        request |= {"stream": True, "return_token_ids": True}
        body = json.dumps(request)
        self._connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):  # `hang_up` closes it
            for line in self._connection.getresponse():
                if line.startswith(b"data: {"):
                    self.tokens += json.loads(line[6:])["choices"][0]["token_ids"]

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def hang_up(self) -> None:
        """Close the connection: the server aborts the request."""
        assert self._connection.sock is not None
        self._connection.sock.shutdown(2)
        self.join()

    def join(self) -> tuple[int, ...]:
        """Wait for the end; return the tokens."""
        self._thread.join(300)
        assert not self._thread.is_alive()
        self._connection.close()
        return tuple(self.tokens)


def asked(server: Server, method: str, path: str) -> int:
    """Return the status of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path)
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_server_takes_part_in_turns(store: Path, served: Server) -> None:
    assert served
    wait_until(lambda: compute(store).gated, "the server to join the arbiter", SOON_S)
    found = compute(store)
    assert (found.held, found.ungated, found.stalled) == (False, "", False)


def test_a_server_is_held_while_a_more_important_workload_works_and_goes_on_with_the_same_tokens(
    store: Path, served: Server, undisturbed: tuple[int, ...], important: Stepping
) -> None:
    with important.working():
        wait_until(lambda: important.steps, "the important workload to work", SOON_S)
        asking = Asking(served)
        wait_until(lambda: compute(store).held, "the server to be held", SOON_S)
        steps = important.steps
        wait_until(lambda: important.steps > steps + 20, "the important workload to go on", SOON_S)
        assert compute(store).held
        assert not asking.tokens
        assert asked(served, "GET", "/health") == 200
        assert asked(served, "POST", "/reset_mm_cache") == 200
    assert asking.join() == undisturbed
    assert compute(store).held_s > 0
    wait_until(lambda: not compute(store).held, "the server to be held no more", SOON_S)


def test_a_request_that_runs_stops_when_a_more_important_workload_begins(
    store: Path, served: Server, undisturbed: tuple[int, ...], important: Stepping
) -> None:
    interrupted = False
    while not interrupted:
        asking = Asking(served)
        wait_until(lambda asking=asking: asking.tokens, "the request to run", SOON_S)
        with important.working():
            wait_until(lambda asking=asking: compute(store).held or not asking.waits, "it to be held, or end", SOON_S)
            used, steps = compute(store).device_s, important.steps
            wait_until(lambda steps=steps: important.steps > steps + 20, "the important workload to go on", SOON_S)
            interrupted = asking.waits and compute(store).held
            assert not interrupted or compute(store).device_s == pytest.approx(used, abs=0.1)
        assert asking.join() == undisturbed


def test_a_request_is_aborted_while_a_server_is_held(
    store: Path, served: Server, undisturbed: tuple[int, ...], important: Stepping
) -> None:
    with important.working():
        asking = Asking(served)
        wait_until(lambda: compute(store).held and row(store).running + row(store).waiting, "it to be held", SOON_S)
        asking.hang_up()
        wait_until(lambda: not row(store).running + row(store).waiting, "the request to be gone", SOON_S)
        wait_until(lambda: not compute(store).held, "the server to wait for nothing", SOON_S)
    assert served.complete(PROMPT, max_tokens=TOKENS).token_ids == undisturbed


def test_a_held_server_is_swapped_out(
    store: Path, served: Server, undisturbed: tuple[int, ...], important: Stepping
) -> None:
    with important.working():
        asking = Asking(served)
        wait_until(lambda: compute(store).held, "the server to be held", SOON_S)
        swaps = row(store).swaps
        with Session.connect(store, autostart=False) as session:
            session.workloads.move("served", out=True)
        assert row(store).swaps > swaps
        tokens = len(asking.tokens)
        assert tokens < TOKENS
    assert asking.join() == undisturbed


def test_a_held_server_goes_on_if_the_arbiter_is_killed_and_takes_part_with_the_next_one(
    store: Path, served: Server, undisturbed: tuple[int, ...], important: Stepping
) -> None:
    with important.working():
        asking = Asking(served)
        wait_until(lambda: compute(store).held, "the server to be held", SOON_S)
        os.kill(arbiter_of(store), signal.SIGKILL)
        wait_until(lambda: asking.tokens, "the server to go on, at once or between others' steps", SOON_S)
    assert asking.join() == undisturbed
    assert "The arbiter is gone" in served.log.read_text(errors="replace")
    wait_until(lambda: important.attached, "the arbiter to be back", SOON_S)
    with important.working():
        asking = Asking(served)
        while not compute(store).held:
            if not asking.waits:  # the server has not joined the next one yet
                assert asking.join() == undisturbed
                asking = Asking(served)
    assert asking.join() == undisturbed


def arbiter_of(store: Path) -> int:
    """Return the pid of a store's arbiter."""
    with Session.connect(store, autostart=False) as session:
        parent = session.store_pid
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            child = entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if child and b"shared_store.compute.arbiter" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise AssertionError("the store has no arbiter")


@pytest.fixture
def saturated(store: Path, checkpoint: Any) -> Iterator[Callable[..., EngineProcess]]:
    """Return a function that starts an engine in its caller's process, which answers without end."""
    started: list[EngineProcess] = []

    def start(name: str, *, priority: int, share: float = 0, **settings: Any) -> EngineProcess:
        job = {"models": [str(checkpoint("llama"))], **SHARING, "settings": settings, "load": True, "count": 200}
        environment = {"WOOLY_WORKLOAD": name, "WOOLY_PRIORITY": str(priority), "WOOLY_COMPUTE_SHARE": str(share)}
        environment |= settings.pop("environment", {})
        started.append(EngineProcess(store, job, **environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


def ends_without_errors(process: EngineProcess) -> None:
    """Let a saturated engine end; all its answers were right."""
    process.tell("stop")
    worked = process.wait("worked")
    assert worked["rounds"] > 0
    assert worked["wrong"] == 0
    assert process.finish() == 0


def test_an_engine_that_wants_its_devices_for_itself_does_not_start_beside_others(
    important: Stepping, saturated: Callable[..., EngineProcess]
) -> None:
    assert important.attached
    process = saturated("alone", priority=2, environment={"GPU_MODE": "Exclusive"})
    error = process.wait("failed")["error"]
    assert "ExclusiveError" in error
    assert "important" in error
    assert process.finish() != 0


def test_engines_share_their_device_by_weight_and_one_that_is_killed_leaves_it_to_the_other(
    store: Path, saturated: Callable[..., EngineProcess]
) -> None:
    """Three times as much, within wide bounds: a loaded machine stops engines whose turn it is."""
    large, small = saturated("large", priority=2, share=75), saturated("small", priority=2, share=25)
    for process in (large, small):
        process.wait("answered")

    def used() -> tuple[float, float]:
        return compute(store, "large").device_s, compute(store, "small").device_s

    wait_until(lambda: min(used()) > 0, "both engines to work", SOON_S)
    before = used()
    wait_until(lambda: sum(used()) > sum(before) + 5, "both engines to work for 5 s", 2 * SOON_S)
    gained = [after - first for after, first in zip(used(), before, strict=True)]
    assert 1.7 < gained[0] / gained[1] < 5.0
    large.process.kill()
    wait_until(lambda: {it.name for it in status_of(store).workloads}.isdisjoint({"large"}), "it to be gone", SOON_S)
    left = compute(store, "small").device_s
    wait_until(lambda: compute(store, "small").device_s > left + 1, "the other one to have the device", SOON_S)
    ends_without_errors(small)


def test_ranks_of_one_engine_are_held_together(
    store: Path, important: Stepping, saturated: Callable[..., EngineProcess]
) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}  # fewer NUMA nodes than ranks
    ranks = saturated("ranks", priority=3, tensor_parallel_size=2, enable_prefix_caching=False, environment=bind)
    ranks.wait("answered")
    wait_until(lambda: compute(store, "ranks").device_s > 0, "the ranks to work", SOON_S)
    with important.working():
        wait_until(lambda: compute(store, "ranks").held, "the ranks to be held", SOON_S)
        used, steps = compute(store, "ranks").device_s, important.steps
        wait_until(lambda: important.steps > steps + 20, "the important workload to go on", SOON_S)
        assert compute(store, "ranks").held
        assert compute(store, "ranks").device_s == pytest.approx(used, abs=1.0)
    wait_until(lambda: compute(store, "ranks").device_s > used + 0.2, "the ranks to go on", SOON_S)
    assert [it.name for it in status_of(store).workloads if it.name.startswith("ranks")] == ["ranks"]
    ends_without_errors(ranks)
