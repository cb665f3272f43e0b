"""wooly with real vLLM on one NVIDIA GPU: loading, memory, speed and how many engines fit, each beside stock vLLM.

The model is Llama-shaped, random, bf16, 9.08 GB (see ``gpu_model.py``), made in ``--model`` if nothing is there. Every
engine is a process of its own, without vLLM's multiprocessing. Results are merged into ``--out`` after each part:
medians by name, and under ``raw`` every value that a median is of.

    python benchmarks/bench_gpu.py [--parts digest,load,peak,decode,ttft,capacity,mps,dedup] [--out FILE]

digest     ``bench_digest.py``: BLAKE3 of the GPU's own memory; ``digest_gbps`` of 64 tensors of 64 MiB in one call.
load       ``load_s``: stock vLLM's loader, files in the page cache. ``publish_s``: what publishing adds to it (wooly's
           loader, less hashing the checkpoint, ``hash_s``, and less the stock load inside). ``attach_ms``: a fresh
           process, from connecting to the store until all parameters are bound, less building the module tree;
           ``attach_total_ms``: the reader's whole loader, building and vLLM's post-processing included.
           ``torch_ipc_attach_ms``: as many tensors of the same sizes opened through torch's CUDA IPC, without binding.
           ``reader_weight_mib``: what loading allocated through torch, and what the store grew by.
           ``vram_one_more_*_mib``: GPU memory that one more engine costs, KV cache of 64 MiB, no CUDA graphs.
peak       ``publish_peak_over_model_mib``: most device memory in use while publishing, over the loaded model.
decode     two live engines with CUDA graphs in turns: 64 requests x 128 tokens, and 64 prompts x 512 tokens.
ttft       from the start of the process to the first token, compile cache warm, weights of wooly in the store.
capacity   engines that live at once (``--kv-mib`` of KV cache each, no CUDA graphs, to keep starts short), and the
           tokens/s of all of them at the same time. Stock ones load one after the other, so that peaks do not meet.
mps        wooly's engines once more, with NVIDIA's Multi-Process Service, where the machine has that.
dedup      a model and three fine-tunes of it, each with a tenth of its layers changed, published without an engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_model
from gpu_processes import MIB, Child, ChildError, Mps, Node, end_all, nvidia_smi, used_mib

import shared_store

HERE = Path(__file__).resolve().parent
Spans = dict[str, list[tuple[float, float]]]

COMMON = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "seed": 0,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
}
SMALL = {**COMMON, "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
FULL = {**COMMON, "max_model_len": 2048, "max_num_seqs": 64}
TINY_KV_MIB, FULL_KV_MIB = 64, 8192
BATCH, SMALL_BATCH = 64, 16
PAIRS = 5


@dataclass
class Findings:
    """Figures of a part: one number a name, and the values behind it."""

    numbers: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, values: Iterable[float]) -> None:
        """The median of some values."""
        self.raw[name] = [round(value, 6) for value in values]
        self.numbers[name] = round(statistics.median(self.raw[name]), 4)


@dataclass
class Bench:
    """What all parts share: the model, and what was asked for."""

    model: Path
    repeats: int
    max_engines: int
    kv_mib: int
    budget_s: float
    weights_mib: float
    total_mib: int

    def engine(
        self,
        node: Node,
        name: str,
        settings: dict[str, Any],
        kv_mib: int,
        *,
        environment: dict[str, str] | None = None,
        **job: Any,
    ) -> Child:
        """Start an engine process; one whose name does not begin with "stock" uses wooly. ``job``: see the process.

        vLLM checks its memory fraction even where the KV cache has a fixed size, so it is what weights and KV cache
        need (at least 1 GiB over the weights): less than any engine takes, stock or not.
        """
        share = (self.weights_mib + max(kv_mib, 1024)) / self.total_mib
        full = {
            "model": str(self.model),
            "load_format": "auto" if name.startswith("stock") else "wooly",
            "gate": True,
            "warm": False,
            "batch": SMALL_BATCH,
            "settings": {**settings, "kv_cache_memory_bytes": kv_mib * MIB, "gpu_memory_utilization": share},
        }
        return node.start(name, "engine", {**full, **job}, **(environment or {}))


def seconds(spans: Spans, label: str) -> float:
    """Time in calls of one function while the model was loaded: vLLM's accounting makes some of them before."""
    began, ended = spans["load"][-1]
    return sum(end - begin for begin, end in spans.get(label, []) if began <= begin and end <= ended)


def attach_seconds(spans: Spans) -> float:
    """From connecting to the store to the last bound parameter, less building the module tree."""
    began, ended = spans["load"][-1]
    connected = next(begin for begin, _ in spans["connect"] if began <= begin)
    bound = next(end for begin, end in spans["bind"] if began <= begin and end <= ended)
    return bound - connected - seconds(spans, "build")


def _check_attached(child: Child, ready: dict[str, Any]) -> None:
    if seconds(ready["spans"], "inner_load"):
        raise ChildError(f"{child.name} was to attach, and loaded")


def digest(bench: Bench) -> Findings:  # noqa: ARG001 - as every part
    """What the digests' own benchmark finds, in a process of its own."""
    command = [sys.executable, str(HERE / "bench_digest.py")]
    return Findings(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120).stdout))


def load(bench: Bench) -> Findings:
    """Stock engines, publishers on a fresh store each, and readers beside the last publisher; one at a time."""
    found = Findings()

    def started(child: Child) -> tuple[dict[str, Any], int]:
        before = used_mib()
        ready = child.ask("start", "ready")
        if child.name == "reader":
            _check_attached(child, ready)
        return ready, used_mib() - before

    with contextlib.ExitStack() as stack:
        # All import vLLM at once, which takes longest, and have their turns on the GPU after that.
        nodes = [stack.enter_context(Node()) for _ in range(bench.repeats)]
        stock = [bench.engine(node, "stock", SMALL, TINY_KV_MIB) for node in nodes]
        publishers = [bench.engine(node, "publisher", SMALL, TINY_KV_MIB) for node in nodes]
        readers = [bench.engine(nodes[-1], "reader", SMALL, TINY_KV_MIB) for _ in range(bench.repeats)]
        for child in (*stock, *publishers, *readers):
            child.hear("imported")
        ready, grown = [], []
        for child in stock:
            facts, mib = started(child)
            ready.append(facts)
            grown.append(mib)
            child.end()
        found.put("load_s", [seconds(facts["spans"], "load") for facts in ready])
        found.put("vram_one_more_stock_mib", grown)
        published, grown = [], []
        for node, child in zip(nodes, publishers, strict=True):
            facts, mib = started(child)
            published.append(facts["spans"])
            grown.append(mib)
            if node is not nodes[-1]:
                node.close()
        _readers(found, nodes[-1], [started(child) for child in _counted(found, nodes[-1], readers)])
        _torch_ipc(found, nodes[-1], facts["sizes"], bench.repeats)
    # The accounting, which asks the store what it has of the model, comes first: it may be what hashes.
    found.put("hash_s", [sum(end - begin for begin, end in spans.get("hash", [])) for spans in published])
    found.put(
        "publish_s",
        [seconds(s, "load") - seconds(s, "hash") - seconds(s, "inner_load") for s in published],
    )
    found.put("publisher_load_s", [seconds(spans, "load") for spans in published])
    found.put("vram_publisher_and_store_mib", grown)
    return found


def _counted(found: Findings, node: Node, readers: list[Child]) -> Iterable[Child]:
    """The readers, one by one; notes what the store grew by meanwhile."""
    before = node.status().totals.resident_bytes
    yield from readers
    found.numbers["store_growth_by_readers_mib"] = (node.status().totals.resident_bytes - before) / MIB


def _readers(found: Findings, node: Node, readers: list[tuple[dict[str, Any], int]]) -> None:
    spans = [facts["spans"] for facts, _ in readers]
    found.put("attach_ms", [1e3 * attach_seconds(each) for each in spans])
    found.put("attach_total_ms", [1e3 * seconds(each, "load") for each in spans])
    for label in ("open", "map", "build", "bind", "post_process"):
        found.put(f"attach_{label}_ms", [1e3 * seconds(each, label) for each in spans])
    found.put(
        "attach_accounting_ms", [1e3 * sum(end - begin for begin, end in each.get("accounting", [])) for each in spans]
    )
    growth = found.numbers["store_growth_by_readers_mib"] / len(readers)
    found.put("reader_weight_mib", [facts["torch_bytes"] / MIB + growth for facts, _ in readers])
    found.put("reader_device_mib", [facts["device_bytes"] / MIB for facts, _ in readers])
    found.put("vram_one_more_wooly_mib", [mib for _, mib in readers])
    found.numbers["model_mib"] = round(sum(readers[0][0]["sizes"]) / MIB, 1)
    found.numbers["store_resident_mib"] = round(node.status().totals.resident_bytes / MIB, 1)


def _torch_ipc(found: Findings, node: Node, sizes: list[int], repeats: int) -> None:
    """The other way to share tensors between processes, with the same number and sizes of them."""
    job = {"sizes": sizes, "path": str(node.scratch / "handles.pickle")}
    sender = node.start("IPC sender", "ipc_sender", job)
    receivers = [node.start("IPC receiver", "ipc_receiver", job) for _ in range(repeats)]
    sender.hear("ready")
    took = []
    for receiver in receivers:
        receiver.hear("imported")
        sender.ask("share", "shared")
        took.append(receiver.ask("open", "ready"))
        receiver.end()
    found.put("torch_ipc_attach_ms", [1e3 * each["attach_s"] for each in took])
    found.numbers["torch_ipc_tensors"] = took[-1]["tensors"]


def peak(bench: Bench) -> Findings:
    """One publisher, watched by another process every 2 ms.

    Memory that torch kept cached after loading is not the model's: it counts as publishing's, while it is kept.
    """
    found = Findings()
    with Node() as node:
        sampler = node.start("sampler", "memory_sampler", {"interval_s": 0.002})
        publisher = bench.engine(node, "publisher", SMALL, TINY_KV_MIB)
        publisher.hear("imported")
        sampler.hear("ready")
        ready = publisher.ask("start", "ready")
        samples = sampler.ask("stop", "samples")["samples"]
    began, ended = ready["spans"]["publish"][-1]
    within = [used for at, used in samples if began <= at <= ended]
    if not within:
        raise ChildError("no sample fell into the time of publishing")
    highest, start = max(within) / MIB, ready["used_before_publish"] / MIB
    cached = ready["cached_before_publish"] / MIB
    found.numbers["publish_peak_over_model_mib"] = round(highest - (start - cached), 1)
    found.numbers["publish_peak_over_start_mib"] = round(highest - start, 1)
    found.raw["publish_peak"] = {"samples": len(within), "seconds": ended - began, "cached_before_mib": cached}
    return found


def decode(bench: Bench) -> Findings:
    """Pairs of runs, stock first in every other pair; ratios are taken within a pair."""
    found = Findings()
    with Node() as node:
        publisher = bench.engine(node, "publisher", FULL, FULL_KV_MIB)  # lengths are part of the key
        engines = {name: bench.engine(node, name, FULL, FULL_KV_MIB, batch=BATCH) for name in ("stock", "wooly")}
        for child in (publisher, *engines.values()):  # one after the other: each sizes itself by free memory
            child.hear("imported")
            ready = child.ask("start", "ready", 400)
            if child is publisher:
                child.end()  # the model stays in the store
            else:
                _check_attached(child, ready)
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {
            kind: {"stock": [], "wooly": []} for kind in ("decode", "prefill")
        }
        for kind, by_name in runs.items():
            for pair in range(PAIRS + 1):  # the first one warms up
                for name in ("stock", "wooly") if pair % 2 else ("wooly", "stock"):
                    run = engines[name].ask(kind)
                    if pair:
                        by_name[name].append(run)
    for kind, by_name in runs.items():
        rates = {name: [run["count"] / (run["ended"] - run["began"]) for run in by_name[name]] for name in by_name}
        for name, values in rates.items():
            found.put(f"{kind}_tok_s_{name}", values)
        found.put(f"{kind}_ratio", [w / s for w, s in zip(rates["wooly"], rates["stock"], strict=True)])
    answers = [run["tokens"] for by_name in runs.values() for name in by_name for run in by_name[name]]
    halves = answers[: 2 * PAIRS], answers[2 * PAIRS :]
    found.numbers["tokens_equal"] = all(each == half[0] for half in halves for each in half)
    found.numbers["tokens_distinct"] = len({token for answer in halves[0][0] for token in answer})
    return found


def ttft(bench: Bench) -> Findings:
    """Fresh processes, stock and wooly in turns; before them one of each that fills the compile cache and the store."""
    found = Findings()
    took: dict[str, list[dict[str, Any]]] = {"stock": [], "wooly": []}
    with Node() as node:
        for number in range(3):
            for name in ("stock", "wooly"):
                child = bench.engine(node, name, FULL, FULL_KV_MIB, batch=BATCH, gate=False)
                imported, ready = child.hear("imported"), child.hear("ready", 400)
                child.end()
                if number:
                    _check_attached(child, ready)
                    times = {"first_token": ready["first_token"], "imported": imported["at"]}
                    took[name].append({key: at - child.spawned for key, at in times.items()})
    for name, starts in took.items():
        found.put(f"ttft_{name}_s", [each["first_token"] for each in starts])
        found.put(f"ttft_import_{name}_s", [each["imported"] for each in starts])
    return found


def capacity(bench: Bench) -> Findings:
    """Stock engines until the first that does not start, then wooly's; each kind answers all at once in the end."""
    found = Findings()
    deadline = time.monotonic() + bench.budget_s
    for name, at_once in (("stock", 1), ("wooly", 4)):
        with Node() as node:
            _put_capacity(found, name, *_fill(bench, node, name, at_once, deadline))
    found.numbers["capacity_kv_mib"] = bench.kv_mib
    return found


def mps(bench: Bench) -> Findings:
    """As many of wooly's engines with the Multi-Process Service as without it, one after the other."""
    found = Findings()
    deadline = time.monotonic() + bench.budget_s
    with Node() as node, Mps(node.scratch) as service:
        living, ended_by = _fill(bench, node, "wooly_mps", 4, deadline, service.environment)
        _put_capacity(found, "wooly_mps", living, ended_by)
        node.end_all()
        node.stop_store()  # the service ends when its clients have, and the store, which an engine started, is one
    with Node() as node:
        alike = replace(bench, max_engines=len(living))
        living, ended_by = _fill(alike, node, "wooly_without_mps", 4, deadline)
        _put_capacity(found, "wooly_without_mps", living, ended_by)
    with_service, without = (found.numbers[f"aggregate_tok_s_wooly_{kind}"] for kind in ("mps", "without_mps"))
    found.numbers["mps_ratio"] = with_service / without
    return found


def _put_capacity(found: Findings, name: str, living: list[Child], ended_by: str) -> None:
    if not living:
        raise ChildError(f"no engine started: {ended_by}")
    rates, living = _all_at_once(living)
    bounded = ended_by in ("budget", "max-engines")
    found.numbers[f"replicas_{name}_at_least" if bounded else f"replicas_{name}"] = len(living)
    found.raw[f"capacity_{name}_ended_by"] = ended_by
    found.put(f"aggregate_tok_s_{name}", rates)


def _fill(
    bench: Bench, node: Node, name: str, at_once: int, deadline: float, environment: dict[str, str] | None = None
) -> tuple[list[Child], str]:
    """Start engines until one fails; returns those that answer, and what the end was.

    Importing vLLM takes longest and no GPU memory, so some processes import ahead of their turn.
    """
    living: list[Child] = []
    imported: list[Child] = []
    starting: list[Child] = []
    made, ended_by = 0, "max-engines"
    while True:
        while made < bench.max_engines and len(imported) < at_once + 4:
            few_threads = {"OMP_NUM_THREADS": "1", **(environment or {})}  # dozens of engines share the cores
            imported.append(
                bench.engine(node, f"{name} {made}", SMALL, bench.kv_mib, environment=few_threads, warm=True)
            )
            made += 1
        while imported and len(starting) < at_once:
            starting.append(imported.pop(0))
            starting[-1].hear("imported")
            starting[-1].tell("start")
        if not starting:
            break
        child = starting.pop(0)
        try:
            child.hear("ready", deadline - time.monotonic())
            living.append(child)
            print(f"  {len(living)} {name}: {nvidia_smi('memory.used')} MiB in use", flush=True)
        except ChildError as error:
            late = time.monotonic() >= deadline
            ended_by = "budget" if late else str(error).partition("\n")[0]
            # Those that had begun before it may still fit: they count, if there is time.
            living += [other for other in starting if _is_ready(other, deadline)]
            end_all(other for other in (child, *starting, *imported) if other not in living)
            break
    return living, ended_by


def _is_ready(child: Child, deadline: float) -> bool:
    try:
        child.hear("ready", deadline - time.monotonic())
    except ChildError:
        return False
    return True


DECODED_WITHIN_S = 120.0
"""For a run of one engine among all of them; it takes seconds when they have a GPU to share, and not for ever."""


def _all_at_once(living: list[Child]) -> tuple[list[float], list[Child]]:
    """Tokens/s of all together in each of three runs, from the first one's start to the last one's end.

    An engine that fails is out, and the others begin anew.
    """
    rates: list[float] = []
    while living and len(rates) < 3:
        for child in living:
            child.tell("decode")
        runs, still = [], []
        for child in living:
            try:
                runs.append(child.hear("decode", DECODED_WITHIN_S))
                still.append(child)
            except ChildError as error:
                print(f"  {str(error).partition(chr(10))[0]}", flush=True)
        if len(still) < len(living):
            rates, living = [], still
            continue
        lasted = max(run["ended"] for run in runs) - min(run["began"] for run in runs)
        rates.append(sum(run["count"] for run in runs) / lasted)
    if not living:
        raise ChildError("no engine answered")
    return rates, living


def dedup(bench: Bench) -> Findings:
    """What the store holds of a model and its fine-tunes, and what it should hold, by the files."""
    found = Findings()
    layers = gpu_model.layer_count(bench.model)
    count = max(1, round(layers / 10))
    models = [bench.model]
    for number in range(1, 4):
        target = bench.model.with_name(f"{bench.model.name}-tune{number}")
        changed = [str((number * count + offset) % layers) for offset in range(count)]
        _run_model("finetune", str(bench.model), str(target), "--changed", *changed, "--seed", str(number))
        models.append(target)
    with Node() as node:
        publisher = node.start("publisher", "plain_publisher", {"device": "cuda"})
        publisher.hear("imported")
        before = used_mib()
        found.put("dedup_publish_s", [publisher.ask(str(model), "published")["seconds"] for model in models])
        resident = node.status().totals.resident_bytes
        publisher.end()
        found.numbers["dedup_vram_mib"] = used_mib() - before
    found.numbers |= {
        "dedup_models": len(models),
        "dedup_layers_changed": count,
        "dedup_layers": layers,
        "dedup_resident_bytes": resident,
        "dedup_expected_bytes": gpu_model.unique_bytes(models),
        "dedup_private_bytes": sum(gpu_model.weight_bytes(model) for model in models),
    }
    return found


PARTS: dict[str, Callable[[Bench], Findings]] = {
    part.__name__: part for part in (digest, load, peak, decode, ttft, capacity, mps, dedup)
}


def _run_model(*arguments: str) -> None:
    """Make a checkpoint in a process of its own, so that this one has no CUDA context."""
    subprocess.run([sys.executable, str(HERE / "gpu_model.py"), *arguments], check=True)


def versions() -> dict[str, str]:
    """What was measured, and where."""
    import torch

    found = {"wooly": shared_store.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for distribution in ("vllm", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            found[distribution.partition("-")[0]] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return {
        **found,
        "gpu": nvidia_smi("name"),
        "driver": nvidia_smi("driver_version"),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }


def commit() -> str:
    """The commit that is measured; ``WOOLY_COMMIT`` says it where the tree is no repository."""
    if given := os.environ.get("WOOLY_COMMIT"):
        return given
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return asked.stdout.strip() or "unknown"


def merge(out: Path, part: str, found: Findings, seconds_taken: float, facts: dict[str, str]) -> None:
    """Write a part's figures into the file, in the place of those that it had of this part."""
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"parts": {}, "raw": {}}
    for name in result["parts"].get(part, {}).get("figures", ()):
        result.pop(name, None)
    for name in result["parts"].get(part, {}).get("raw", ()):
        result["raw"].pop(name, None)
    result["versions"] = facts
    result["parts"][part] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "seconds": round(seconds_taken, 1),
        "figures": sorted(found.numbers),
        "raw": sorted(found.raw),
    }
    result["raw"] |= found.raw
    figures = {name: value for name, value in result.items() if name not in ("versions", "parts", "raw")}
    ordered = {"versions": facts, **figures, **found.numbers, "parts": result["parts"], "raw": result["raw"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def machine(gpu: str) -> str:
    """The folder of a GPU's results: ``NVIDIA H100 80GB HBM3`` is ``h100``."""
    found = re.search(r"\b[A-Z]+\d+\w*", gpu)
    return found.group().lower() if found else "gpu"


def _parts(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return wanted


def main() -> None:
    """Run the parts, writing results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"of {','.join(PARTS)}; all by default")
    parser.add_argument("--model", type=Path, default=Path("/tmp/wooly-bench-model"), help="made if it is not there")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind in the part load")
    parser.add_argument("--max-engines", type=int, default=24, help="for the part capacity")
    parser.add_argument("--kv-mib", type=int, default=2048, help="KV cache of each engine of the part capacity")
    parser.add_argument(
        "--budget", type=float, default=420, help="seconds in which the parts capacity and mps start engines"
    )
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/GPU/gpu.json")
    arguments = parser.parse_args()
    try:
        facts = versions()
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"this benchmark needs an NVIDIA GPU: {error}") from error
    out = arguments.out or HERE / "results" / machine(facts["gpu"]) / "gpu.json"
    _run_model("make", str(arguments.model))
    bench = Bench(
        model=arguments.model,
        repeats=arguments.repeats,
        max_engines=arguments.max_engines,
        kv_mib=arguments.kv_mib,
        budget_s=arguments.budget,
        weights_mib=gpu_model.weight_bytes(arguments.model) / MIB,
        total_mib=int(nvidia_smi("memory.total")),
    )
    failed = []
    for part in arguments.parts:
        began = time.monotonic()
        try:
            found = PARTS[part](bench)
        except ChildError as error:
            failed.append(part)
            print(f"{part}: failed after {time.monotonic() - began:.0f} s: {error}", flush=True)
            continue
        merge(out, part, found, time.monotonic() - began, facts)
        print(f"{part} ({time.monotonic() - began:.0f} s): {json.dumps(found.numbers)}", flush=True)
    if failed:
        raise SystemExit(f"without a result: {', '.join(failed)}")


if __name__ == "__main__":
    main()
