"""LoRA servers over one base: the base is shared, adapters are private to each server, and answers are stock's.

vLLM wraps the base layers in LoRA layers after the loader has returned, so sharing is checked after adapters have been
loaded and used.
"""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines.engine import CPU_KV_BLOCKS, PROMPTS, TOKENS
from support.adapters import random_adapter
from support.engines import STARTED_WITHIN_S, EngineProcess, status_of
from support.mapped import segment_ranges
from support.servers import CPU_ENVIRONMENT, Server
from support.waiting import wait_until

from shared_store.base.workloads import WorkloadStatus
from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

NAMES = ("one", "two")
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_num_batched_tokens": 1024}
PLAIN: dict[str, Any] = {"max_num_batched_tokens": 1024}
SERVING = ("--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "1024", "--dtype", "bfloat16")
SERVING += ("--num-gpu-blocks-override", str(CPU_KV_BLOCKS))
SERVING += ("--enforce-eager", "--load-format", "wooly", "--model-loader-extra-config", '{"fallback": false}')
LARGER_LIMITS = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "16")
"""Larger limits for adapters than those of ``LORA``."""


def segments_of(status: Any) -> list[tuple[str, int, int, int]]:
    """Return segments and their bytes on each device: free memory changes all the time."""
    return [(one.id, one.segments, one.resident_bytes, one.dead_bytes) for one in status.devices]


@pytest.fixture(scope="module")
def adapters(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the directories of two adapters of the base, by name."""
    directory = tmp_path_factory.mktemp("adapters")
    base = checkpoint("llama")
    return {name: str(random_adapter(base, directory / name, seed=seed)) for seed, name in enumerate(NAMES)}


def _run(runtime_dir: Path, base: Path, settings: list[Any], environment: dict[str, str], **job: Any) -> list[Any]:
    process = EngineProcess(
        runtime_dir, {"models": [str(base)] * len(settings), "settings": settings, **job}, **environment
    )
    try:
        assert process.finish() == 0, "\n".join(process.log[-40:])
        return [event for event in process.events if event["event"] == "answered"]
    finally:
        process.close()


@pytest.fixture(scope="module")
def stock(module_runtime_dir: Path, checkpoint: Any, adapters: dict[str, str]) -> dict[str, Any]:
    """Return the answers of stock vLLM, with wooly's kernels and the same LoRA settings."""
    kernels = {"WOOLY_CPU_DISPATCH": "1"}
    (answers,) = _run(module_runtime_dir, checkpoint("llama"), [LORA], kernels, adapters=adapters)
    tokens: dict[str, Any] = answers["with_adapters"]
    return tokens


@pytest.fixture(scope="module")
def shared(module_runtime_dir: Path, checkpoint: Any, adapters: dict[str, str]) -> list[dict[str, Any]]:
    """Return the answers of three engines in sequence: without LoRA, with it (publishes), and with it (attaches)."""
    job = {"load_format": "wooly", "extra": {"fallback": False}, "adapters": adapters}
    return _run(module_runtime_dir, checkpoint("llama"), [PLAIN, LORA, LORA], {}, **job)


@pytest.fixture(scope="module")
def swap_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module")
def servers(
    module_runtime_dir: Path, checkpoint: Any, shared: Any, swap_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """Start two servers over the resident base, with larger limits for adapters."""
    assert shared
    logs = tmp_path_factory.mktemp("logs")
    environment = CPU_ENVIRONMENT | {
        "WOOLY_RUNTIME_DIR": str(module_runtime_dir),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "WOOLY_SWAP_DIR": str(swap_dir),
    }
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                Server(
                    name,
                    checkpoint("llama"),
                    logs / name,
                    arguments=(*SERVING, *LARGER_LIMITS),
                    environment=environment,
                )
            )
            for name in ("first", "second")
        ]
        for server in started:
            server.wait_ready(STARTED_WITHIN_S)
        yield started


def _post(server: Server, path: str, body: dict[str, Any]) -> str:
    """Return the text of an answer; those about adapters are not JSON."""
    address = f"http://127.0.0.1:{server._port}{path}"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())


def _tokens(server: Server, model: str) -> list[list[int]]:
    greedy = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    questions = [{"model": model, "prompt": list(prompt), **greedy} for prompt in PROMPTS]
    replies = [json.loads(_post(server, "/v1/completions", question)) for question in questions]
    return [reply["choices"][0]["token_ids"] for reply in replies]


def test_each_adapter_changes_the_answer(stock: dict[str, Any]) -> None:
    """Control: the base and each adapter answer every prompt differently."""
    for base, one, two in zip(stock["base"], stock["one"], stock["two"], strict=True):
        assert len({tuple(base), tuple(one), tuple(two)}) == 3
        assert min(len(set(answer)) for answer in (base, one, two)) > 1
    assert stock["base again"] == stock["base"]


@pytest.mark.parametrize("role", ["publisher", "reader"])
@pytest.mark.parametrize("what", ["base", *NAMES, "base again"])
def test_answers_equal_stock(stock: dict[str, Any], shared: Any, what: str, role: str) -> None:
    """Of the base, each adapter, and the base once the adapters are unloaded."""
    engine = shared[1:][["publisher", "reader"].index(role)]
    assert engine["removed"]
    assert engine["with_adapters"][what] == stock[what]


@pytest.mark.parametrize("role", ["publisher", "reader"])
def test_the_base_is_shared_and_adapters_are_private(shared: Any, checkpoint: Any, role: str) -> None:
    """After adapters were used, the base is in the store's memory and unwritten, and their tensors are not."""
    engine = shared[1:][["publisher", "reader"].index(role)]
    weights = engine["weights"]
    stored = sum(file.stat().st_size for file in checkpoint("llama").glob("*.safetensors"))
    assert weights["shared"] == engine["mapped_bytes"] > 0.99 * stored
    assert weights["private"] < weights["shared"] / 1000
    assert weights["written"] == 0
    assert weights["deltas"] > 1e5
    assert weights["deltas_shared"] == 0


@pytest.mark.usefixtures("shared")
def test_an_engine_with_lora_has_the_tensors_of_one_without(module_runtime_dir: Path) -> None:
    """Two weight keys, since LoRA changes some kinds of layers; for this model every byte is shared."""
    status = status_of(module_runtime_dir)
    assert [model.unique_bytes for model in status.models] == [0, 0]
    assert len({model.key for model in status.models}) == 2
    assert status.counters.fallbacks == 0


def test_two_servers_share_the_base_and_load_adapters_while_they_run(
    servers: list[Server], stock: dict[str, Any], adapters: dict[str, str], module_runtime_dir: Path
) -> None:
    """Over the API, with other limits for adapters than the publisher: stock's tokens, one base in memory."""
    first, second = servers
    before = status_of(module_runtime_dir)
    for server in servers:
        for name in NAMES:
            _post(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapters[name]})
        assert {name: _tokens(server, name) for name in NAMES} == {name: stock[name] for name in NAMES}
        assert _tokens(server, "model") == stock["base"]
    _post(first, "/v1/unload_lora_adapter", {"lora_name": "one"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        _tokens(first, "one")
    refused.value.close()
    assert refused.value.code == 404
    assert _tokens(first, "model") == stock["base"]
    assert _tokens(second, "one") == stock["one"]
    _post(first, "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": adapters["one"]})
    assert _tokens(first, "one") == stock["one"]

    after = status_of(module_runtime_dir)
    assert (after.counters.publishes, after.counters.fallbacks) == (2, 0)
    assert segments_of(after) == segments_of(before)
    readers = [client for client in after.clients if client.role == "reader"]
    assert len(readers) == 2
    assert len({reader.key for reader in readers}) == 1
    for reader in readers:
        assert reader.private_bytes < reader.mapped_bytes / 1000
        ranges = segment_ranges(reader.pid)
        assert sum(found.end - found.start for found in ranges) >= reader.mapped_bytes
        assert sum(found.private_bytes for found in ranges) == 0


def _workload(server: Server, runtime_dir: Path) -> WorkloadStatus | None:
    """Return what the store knows of a server; None if it does not list it."""
    pids = server.pids()
    return next((one for one in status_of(runtime_dir).workloads if one.pid in pids), None)


def _damage(pids: set[int], directory: Path) -> None:
    """Change a byte at the beginning of each swap file that processes have open: adapters come first."""
    damaged = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            if str(path.readlink()).startswith(str(directory)) and path.stat().st_ino not in damaged:
                damaged.add(path.stat().st_ino)
                with path.open("r+b", buffering=0) as file:
                    byte = file.read(1)
                    file.seek(0)
                    file.write(bytes([byte[0] ^ 1]))
    assert damaged


def test_a_server_whose_adapters_are_lost_while_it_is_away_ends_and_the_other_goes_on(
    servers: list[Server], stock: dict[str, Any], module_runtime_dir: Path, swap_dir: Path
) -> None:
    """They cannot be computed again: no request is answered with wrong ones, and the store forgets the workload."""
    first, second = servers
    found = _workload(second, module_runtime_dir)
    assert found is not None
    with Session.connect(module_runtime_dir, autostart=False) as session:
        session.workloads.move(found.name, out=True)
    _damage(second.pids(), swap_dir)
    with pytest.raises((urllib.error.URLError, ConnectionError)) as failed:
        _tokens(second, "one")
    if isinstance(failed.value, urllib.error.HTTPError):
        failed.value.close()
        assert failed.value.code >= 500
    wait_until(lambda: _workload(second, module_runtime_dir) is None, "the store to forget the workload")
    wait_until(lambda: second._process.poll() is not None, "the server to end", 60.0)
    assert "this engine ends, as a move of its memory failed" in second.log.read_text()
    assert _tokens(first, "one") == stock["one"]
    assert [one.state for one in status_of(module_runtime_dir).workloads] == ["resident"]
