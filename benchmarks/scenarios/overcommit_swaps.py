"""Parts of the benchmark ``overcommit`` with engines in workers: ``swap``, ``tokens``, ``families``, ``neighbour``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from support.adapters import random_adapter
from support.models.families import random_model

from benchmarks.harness.figures import MIB, Figures, percentile
from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child, ChildError
from benchmarks.scenarios.overcommit_setup import START_TIMEOUT_S, Setup, bytes_of, row

RUNNERS = {"v1": "0", "v2": "1"}
"""``VLLM_USE_V2_MODEL_RUNNER`` of vLLM's two model runners."""

MIN_SWAPS = 10


def _ask(child: Child, command: str, timeout_s: float = 300, **given: Any) -> dict[str, Any]:
    return child.ask(f"{command} {json.dumps(given)}", command, timeout_s)


def _start(child: Child) -> dict[str, Any]:
    child.wait("imported", START_TIMEOUT_S)
    child.ask("start", "ready", START_TIMEOUT_S)
    facts = _ask(child, "facts")
    if facts["refusal"]:
        raise ChildError(f"{child.name} is never swapped out: {facts['refusal']}")
    return {name: fact for name, fact in facts.items() if name not in ("event", "at")}


def _put_steps(found: Figures, name: str, moves: Iterable[dict[str, Any]]) -> None:
    """Record the seconds of each part of several moves, under one name."""
    known = list(moves)
    steps = {step for move in known for step in move.get("steps", ())}
    for step in sorted(steps):
        found.put(f"{name}_{step}_s", [move["steps"].get(step, 0.0) for move in known])


def swap(setup: Setup) -> Figures:
    """Swap an engine out while all its requests run, the first time and later; and what it keeps on its device."""
    found, firsts = Figures(), []
    kv = setup.scale.large_kv
    with setup.node(setup.room_for(1, kv)) as node:
        before = setup.used()
        children = [setup.engine(node, f"engine-{number}", setup.first, kv) for number in range(setup.firsts)]
        for child in children:  # one at a time; the last one is swapped again and again
            facts = _start(child)
            _ask(child, "batch")
            firsts.append(_ask(child, "batch", swaps=1, first=setup.scale.tokens // 2)["swaps"][0])
            if child is not children[-1]:
                child.end()
        later: list[dict[str, Any]] = []
        while len(later) < max(MIN_SWAPS, setup.scale.repeats):
            answered = _ask(child, "batch", swaps=4, first=setup.scale.tokens // 4)
            if answered["different"]:
                raise ChildError(f"{answered['different']} of {answered['requests']} answers have other tokens")
            later += answered["swaps"]
        kept, private = _kept(setup, node, child, before)
        child.end()
    if min(one["running"] for one in (*firsts, *later)) < setup.scale.batch:
        raise ChildError("not all requests were running at a swap")
    for name, swaps in (("first", firsts), ("later", later)):
        found.put(f"swap_out_{name}_s", [one["out_s"] for one in swaps])
        found.put(f"swap_in_{name}_s", [one["in_s"] for one in swaps])
        found.put(f"swap_moved_{name}_mib", [one["out"]["moved"] / MIB for one in swaps])
        _put_steps(found, f"swap_out_{name}", [one["out"] for one in swaps])
        _put_steps(found, f"swap_in_{name}", [one["in"] for one in swaps])
    found.put("swapped_stays_mib", private)
    if kept:
        found.put("swapped_vram_mib", kept)
    found.numbers |= {"swap_requests": setup.scale.batch, "swap_kv_mib": kv // MIB, "swap_facts": facts}
    return found


def _kept(setup: Setup, node: Node, child: Child, before: int) -> tuple[list[float], list[float]]:
    """Return what an engine without requests keeps when it is swapped: of the GPU, and in the store's account."""
    kept, private = [], []
    with node.session() as session:
        for _ in range(setup.scale.repeats):
            _ask(child, "leave")
            private.append(bytes_of(row(session, child.name), setup.device)[0] / MIB)
            if setup.on_gpu:
                kept.append((setup.used() - before) / MIB)
            _ask(child, "batch")
    return kept, private


def tokens(setup: Setup) -> Figures:
    """Swap an engine a hundred times while its requests run, with both model runners, and compare all tokens."""
    found = Figures()
    kv = setup.scale.large_kv
    with setup.node(setup.room_for(1, kv)) as node:
        children = {
            name: setup.engine(node, name, setup.first, kv, VLLM_USE_V2_MODEL_RUNNER=value)
            for name, value in RUNNERS.items()
            if setup.on_gpu or name == "v1"  # the second one needs Triton
        }
        for name, child in children.items():
            facts = _start(child)
            found.numbers |= _compared(child, f"tokens_{name}", setup.scale.batches, setup.scale.swaps)
            found.numbers[f"tokens_{name}_runner"] = facts["runner"]
            child.end()
    return found


def _compared(child: Child, name: str, batches: int, swaps: int) -> dict[str, Any]:
    """Answer a batch twice without swaps, then with; return how many answers differ."""
    _ask(child, "batch")
    undisturbed = _ask(child, "batch")
    answered = [_ask(child, "batch", swaps=swaps) for _ in range(batches)]
    return {
        f"{name}_swaps": sum(len(one["swaps"]) for one in answered),
        f"{name}_answers": sum(one["requests"] for one in answered),
        f"{name}_different": sum(one["different"] for one in answered),
        f"{name}_different_without_swaps": undisturbed["different"],
    }


def _families(setup: Setup, scratch: Path) -> dict[str, dict[str, Any]]:
    """Return model and job of each kind of engine."""
    made = {name: random_model(name, setup.directory) for name in ("llama", "qwen3-moe", "deepseek-v3", "gemma3")}
    found: dict[str, dict[str, Any]] = {
        "dense": {"model": made["llama"]},
        "moe": {"model": made["qwen3-moe"]},
        "mla": {"model": made["deepseek-v3"]},
        "windows": {"model": made["gemma3"]},
        "lora": {
            "model": made["llama"],
            "adapter": str(random_adapter(made["llama"], scratch / "adapter", seed=1)),
            "settings": {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8},
        },
        "draft": {
            "model": made["llama"],
            "settings": {
                "speculative_config": {
                    "method": "draft_model",
                    "model": str(random_model("llama-tied", setup.directory)),
                    "num_speculative_tokens": 2,
                }
            },
        },
    }
    if setup.on_gpu:  # a CPU does not run all of these
        found["hybrid"] = {"model": random_model("jamba", setup.directory)}
        found["multimodal"] = {"model": random_model("qwen2-vl", setup.directory)}
        found["fp8_kv"] = {"model": made["llama"], "settings": {"kv_cache_dtype": "fp8"}}
        if _gpus() > 1:
            found["tp2"] = {"model": made["llama"], "settings": {"tensor_parallel_size": 2}}
    return found


def _gpus() -> int:
    from shared_store.memory.cuda.driver import visible_gpus

    return len(visible_gpus())


def families(setup: Setup) -> Figures:
    """Swap tiny engines of many kinds three times while their requests run, and compare all tokens."""
    found = Figures()
    failed: dict[str, str] = {}
    kv = setup.scale.small_kv
    lanes = 4 if setup.on_gpu else 1
    with (
        tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp") as scratch,
        setup.node(setup.room_for(lanes, kv)) as node,
    ):
        kinds = _families(setup, Path(scratch))
        names = list(kinds)
        for some in (names[first : first + lanes] for first in range(0, len(names), lanes)):
            failed |= _some_families(setup, node, {name: dict(kinds[name]) for name in some}, found)
    found.numbers |= {f"family_{name}_failed": reason for name, reason in failed.items()}
    return found


def _some_families(setup: Setup, node: Node, kinds: dict[str, dict[str, Any]], found: Figures) -> dict[str, str]:
    """Start engines at the same time, as importing takes longest, and compare them in turn; return what failed."""
    failed, children = {}, {}
    for name, kind in kinds.items():
        model = kind.pop("model")
        # GPU kernels for random models need no graphs to be swapped: the dense model of the part tokens has them.
        limits = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "gpu_memory_utilization": 0.1}
        job = {"batch": 8, "tokens": 40, **kind, "settings": {**limits, **kind.get("settings", {})}}
        children[name] = setup.engine(node, name, model, setup.scale.small_kv, job=job)
    for name, child in children.items():
        try:
            _start(child)
            found.numbers |= _compared(child, f"family_{name}", 1, 3)
        except ChildError as error:
            failed[name] = str(error).partition("\n")[0]
            print(f"families: {error}", flush=True)
        child.end()
    return failed


def neighbour(setup: Setup) -> Figures:
    """Measure the steps of an engine alone, and while another one is swapped out and in without pause."""
    found = Figures()
    kv = setup.scale.large_kv
    first, second = setup.models(2)
    steps: dict[str, list[Sequence[float]]] = {"alone": [], "beside": []}
    moves = 0
    with setup.node(setup.room_for(2, kv), min_resident_s=0.1) as node, node.session() as session:
        measured = setup.engine(node, "neighbour", first, kv)
        moved = setup.engine(node, "moved", second, kv)
        for child in (measured, moved):
            _start(child)
            _ask(child, "batch")
        for number in range(2 * setup.scale.repeats):
            kind = "alone" if number % 2 == 0 else "beside"
            measured.tell(f"steps {json.dumps({'seconds': setup.scale.window_s})}")
            while kind == "beside" and not measured.has_event():
                session.workloads.move("moved", out=True)
                session.workloads.move("moved", out=False)
                moves += 1
            steps[kind].append(sorted(measured.wait("steps")["steps"]))
    for kind, windows in steps.items():
        found.put(f"neighbour_{kind}_p50_ms", [1e3 * percentile(one, 50) for one in windows])
        found.put(f"neighbour_{kind}_p99_ms", [1e3 * percentile(one, 99) for one in windows])
        found.put(f"neighbour_{kind}_max_ms", [1e3 * one[-1] for one in windows])
        found.numbers[f"neighbour_{kind}_steps"] = sum(map(len, windows))
    pairs = zip(steps["alone"], steps["beside"], strict=True)
    found.put("neighbour_p99_ratio", [percentile(during, 99) / percentile(alone, 99) for alone, during in pairs])
    found.numbers["neighbour_swaps"] = moves
    return found
