"""Plots: SVG files in ``results/plots``, drawn from the JSON beside them.

    python benchmarks plot [--results DIR]

``cpu.json``: memory and speed by role. ``MACHINE/gpu.json``: attaching, memory, speed and capacity. ``cpu-hf.json`` and
``MACHINE/hf.json``: transformers' memory, load time and speed. ``scale.json``: growth of costs with a store's size.
``overcommit-sim.json``: time to first token by policy. ``compute-sim.json``: time between tokens by priority, and
pauses by quantum. ``MACHINE/overcommit.json``: time to first token of returns and of models.
``MACHINE/compute.json``: time per token and throughput by the way to share a device.

Prints the names of plots whose figures were not measured. Equal JSON gives equal bytes under the same version of
matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.harness.arguments import parser
from benchmarks.harness.figures import GIB, MIB
from benchmarks.harness.results import RESULTS
from benchmarks.report.charts import OTHER, STOCK, WOOLY, Bar, bars, groups, growth, lines, pairs

ROLES = {"stock": STOCK, "stock_dispatch": OTHER, "publisher": WOOLY, "reader": WOOLY}
LABELS = {"stock_dispatch": "stock,\nwooly's kernels"}

Figures = dict[str, Figure]
"""Plots by file name, without suffix."""

GPU_CHARTS: dict[str, tuple[str, str, dict[str, tuple[str, float, str]]]] = {
    "attach": (
        "Time to load the weights in one more process",
        "milliseconds",
        {
            "load_s": ("stock load", 1e3, STOCK),
            "torch_ipc_attach_ms": ("torch CUDA IPC\n(no binding)", 1, OTHER),
            "attach_ms": ("wooly attach", 1, WOOLY),
            "attach_total_ms": ("wooly loader,\ntotal", 1, WOOLY),
        },
    ),
    "memory": (
        "GPU memory of one more engine (64 MiB of KV cache)",
        "GiB",
        {
            "vram_one_more_stock_mib": ("stock", MIB / GIB, STOCK),
            "vram_one_more_wooly_mib": ("wooly", MIB / GIB, WOOLY),
        },
    ),
    "decode": (
        "Decode, 64 requests x 128 tokens",
        "tokens/s",
        {"decode_tok_s_stock": ("stock", 1, STOCK), "decode_tok_s_wooly": ("wooly", 1, WOOLY)},
    ),
    "prefill": (
        "Prefill, 64 prompts x 512 tokens",
        "tokens/s",
        {"prefill_tok_s_stock": ("stock", 1, STOCK), "prefill_tok_s_wooly": ("wooly", 1, WOOLY)},
    ),
    "ttft": (
        "Process start to first token, warm compile cache",
        "seconds",
        {"ttft_stock_s": ("stock", 1, STOCK), "ttft_wooly_s": ("wooly", 1, WOOLY)},
    ),
    "dedup": (
        "A model and three fine-tunes of two layers in 16",
        "GiB",
        {
            "dedup_private_bytes": ("private copies", 1 / GIB, STOCK),
            "dedup_expected_bytes": ("distinct tensors\nin the files", 1 / GIB, OTHER),
            "dedup_resident_bytes": ("resident\nin the store", 1 / GIB, WOOLY),
        },
    ),
}
"""Title, unit, and bars (figure: label, scale, colour) of each plot of a GPU."""


def hf_cpu(result: dict[str, Any]) -> Figures:
    """Draw memory of eight processes, and load time, by scenario."""
    ways = [value for name, value in result.items() if name != "versions"]
    if not ways:
        return {}
    labels = [way["what"] for way in ways]
    where = result["versions"]["cpu"]

    def of(kind: str, name: str, scale: float = 1) -> list[float]:
        values = [way[kind][name] for way in ways]
        return [(value["median"] if isinstance(value, dict) else value) / scale for value in values]

    memory, load = (
        (of("stock", name, scale), of("wooly", name, scale)) for name, scale in (("pss_8", GIB), ("load_s", 1))
    )
    return {
        "cpu_hf_memory": pairs(f"Memory of 8 transformers processes (PSS)\n{where}", "GiB", labels, *memory),
        "cpu_hf_load": pairs(f"from_pretrained in one more process\n{where}", "seconds", labels, *load),
    }


def hf_gpu(machine: str, result: dict[str, Any]) -> Figures:
    """Draw GPU memory by the number of processes, load time, and speed, as far as they were measured."""
    where = result["versions"]["gpu"]
    figures = {}
    counts = [count for count in (1, 2, 4, 8) if f"hf_vram_{count}_wooly_mib" in result]
    if counts:
        # A number of stock processes that did not fit is drawn as zero.
        stock, wooly = (
            [result.get(f"hf_vram_{count}_{kind}_mib", 0) * MIB / GIB for count in counts]
            for kind in ("stock", "wooly")
        )
        labels = [f"{count} process{'es' if count > 1 else ''}" for count in counts]
        figures["memory"] = pairs(f"GPU memory of transformers processes\n{where}", "GiB", labels, stock, wooly)
        load: list[Bar] = [
            ("stock load", result["hf_load_s"], STOCK),
            ("wooly, first\n(hash, load, publish)", result["hf_publish_s"], WOOLY),
            ("wooly attach", result["hf_attach_s"], WOOLY),
        ]
        figures["load"] = bars(f"from_pretrained to the GPU\n{where}", "seconds", load)
    if "hf_tok_s_wooly" in result:
        rates: list[Bar] = [("stock", result["hf_tok_s_stock"], STOCK), ("wooly", result["hf_tok_s_wooly"], WOOLY)]
        figures["speed"] = bars(f"generate, 8 prompts x 128 tokens\n{where}", "tokens/s", rates)
    return {f"{machine}_hf_{name}": figure for name, figure in figures.items()}


def cpu(result: dict[str, Any]) -> Figures:
    """Draw memory, load time and speed by role."""
    roles = {role: colour for role, colour in ROLES.items() if role in result}

    def of(name: str, scale: float = 1) -> list[Bar]:
        return [
            (LABELS.get(role, role), result[role][name]["median"] / scale, colour) for role, colour in roles.items()
        ]

    where = f"{result['model']}, {result['versions']['cpu']}"
    return {
        "cpu_memory": bars(f"Memory per engine process (PSS)\n{where}", "MiB", of("memory_bytes", MIB)),
        "cpu_load": bars(f"Time to load or attach\n{where}", "seconds", of("load_s")),
        "cpu_decode": bars(f"Decode\n{where}", "tokens/s", of("tokens_per_s")),
    }


def scale(result: dict[str, Any]) -> Figures:
    """Draw the growth of each request's cost with the numbers of models, blobs and clients together."""
    points = [result["points"][name] for name in ("tenth", "half", "full") if name in result["points"]]
    if len(points) < 2:
        return {}
    costs = {name: [point["requests"][name]["cpu_ms"] for point in points] for name in points[0]["requests"]}
    costs["restart"] = [point["restart"]["serving_cpu_s"] for point in points]
    title = f"CPU time of the store for a request, by its size\n{result['versions']['cpu']}"
    unit = "blobs, with a model and a client for each 300"
    return {"cpu_scale": growth(title, unit, [point["blobs"] for point in points], costs)}


POLICIES = {
    "wooly": "wooly",
    "first_come": "first come, first served",
    "lru": "least recently used",
    "by_hand": "sleep by hand",
}
"""Labels of the simulated policies."""


def overcommit(result: dict[str, Any]) -> Figures:
    """Draw the 99th percentile of the time to first token by policy: by priority, and by number of workloads."""
    what = f"simulated: {result['gpus']:,} GPUs, {result['seconds']:g} s"
    levels = [level for level in result["mixed"]["wooly"]["ttft_s"] if level != "all"]
    counts = [name for name in result["raw"]["parts"]["wooly"] if name.endswith(" workloads")]
    by_level = {
        label: [result["mixed"][name]["ttft_s"][level]["p99"] for level in levels] for name, label in POLICIES.items()
    }
    by_count = {
        label: [result["raw"]["parts"][name][count]["ttft_s"]["all"]["p99"] for count in counts]
        for name, label in POLICIES.items()
    }
    title = f"Time to first token with more workloads than memory\n{what}"
    unit = "99th percentile, seconds"
    return {
        "overcommit_priorities": lines(title, ("priority", unit), [level.upper() for level in levels], by_level),
        "overcommit_workloads": lines(
            title, ("workloads on a GPU", unit), [one.split()[0] for one in counts], by_count
        ),
    }


COMPUTE_WAYS = {
    "hold_0": "wooly",
    "hold_2": "wooly, a forced step after 2 s",
    "free": "time slicing",
    "turns": "one step at a time",
}
"""Labels of the simulated ways to share a device's time."""


def compute(result: dict[str, Any]) -> Figures:
    """Draw the time between tokens by priority and way, and the longest pause of two equals by the quantum."""
    levels = [f"p{level}" for level in range(5)]
    by_way = {
        label: [result["mixed"][way][level].get("p99", math.nan) for level in levels]
        for way, label in COMPUTE_WAYS.items()
    }
    quanta = list(result["raw"]["shares"])
    by_pair = {
        pair: [result["raw"]["shares"][quantum][pair]["between_ms"]["max"] for quantum in quanta]
        for pair in result["raw"]["shares"][quanta[0]]
    }
    mixes = f"simulated: {result['mixes']:,} mixes of 2 to 8 workloads, {result['seconds']:g} s"
    return {
        "compute_priorities": lines(
            f"Time between tokens by that alone\n{mixes}",
            ("priority", "99th percentile"),
            [level.upper() for level in levels],
            by_way,
        ),
        "compute_quantum": lines(
            "Longest pause of the one of two equals that has 75%\nsimulated",
            ("quantum", "milliseconds"),
            quanta,
            by_pair,
        ),
    }


ADDED = {
    "ttft_base_awake_added_s": "base awake\nin another",
    "ttft_host_added_s": "weights\non the host",
    "ttft_victim_added_s": "memory of\nan idle one",
    "deep_base_awake_added_s": "off the GPU,\nbase awake",
    "deep_host_added_s": "off the GPU",
}
"""Labels of times that a return adds to the first token."""

WAYS = {
    "wooly": "wooly",
    "fits": "stock, what fits",
    "sleep": "stock, sleep by a script",
    "small_kv": "stock, small KV caches",
}
"""Labels of the ways to serve four models."""


def overcommit_gpu(machine: str, result: dict[str, Any]) -> Figures:
    """Draw what returns add to the first token, and times to first token of four models, as far as measured."""
    where = result["versions"]["gpu"]
    figures = {}
    added: list[Bar] = [(label, result[name], WOOLY) for name, label in ADDED.items() if name in result]
    if added:
        title = f"Added to the time to first token by a return\n{where}"
        figures[f"{machine}_overcommit_returns"] = bars(title, "seconds", added)
    levels = ("p0", "p1", "p3", "all")
    ways = {label: [result.get(f"mix_{way}_{level}_p99_s") for level in levels] for way, label in WAYS.items()}
    drawn = {label: [one or math.nan for one in values] for label, values in ways.items() if any(values)}
    if drawn:
        title = f"Time to first token, four models of 9 GB on 80 GB\n{where}"
        names = [level.upper() if level != "all" else level for level in levels]
        figures[f"{machine}_overcommit_mix"] = lines(title, ("priority", "99th percentile, seconds"), names, drawn)
    return figures


SHARING = {
    "plain": "time slicing",
    "mps": "MPS",
    "mps_capped": "MPS, the other one\nat 25% of threads",
    "hold_0": "wooly",
    "hold_2": "wooly, a step\nevery 2 s",
}
"""Labels of the ways to share a device."""

LOADS = {"steps": "synthetic steps", "engines": "two vLLM engines"}


def compute_ways(machine: str, result: dict[str, Any]) -> Figures:
    """Draw times per token beside a busy workload, and the throughput of both, by the way to share a device."""
    where = result["versions"].get("gpu") or f"one core, {result['versions']['cpu']}"
    figures = {}
    for load, what in LOADS.items():
        ways = {way: label for way, label in SHARING.items() if f"{load}_{way}_p50_ratio" in result}
        if not ways:
            continue
        labels = list(ways.values())

        def of(figure: str, load: str = load, ways: dict[str, str] = ways) -> list[float]:
            return [result[f"{load}_{way}_{figure}"] for way in ways]

        title = f"Time per token of an important workload beside a busy one\n{what}, {where}"
        values = {"median": of("p50_ratio"), "99th percentile": of("p99_ratio")}
        figures[f"{machine}_compute_{load}"] = groups(title, "by the time alone", labels, values, (WOOLY, OTHER))
        title = f"Throughput of both together, by what each does alone\n{what}, {where}"
        values = {"tokens without pause": of("together"), "requests at 30% load": of("requests_together")}
        figures[f"{machine}_compute_{load}_together"] = groups(title, "sum", labels, values, (WOOLY, OTHER))
    return figures


def gpu(machine: str, result: dict[str, Any]) -> Figures:
    """Draw the plots of a GPU of which all figures were measured."""
    where = result["versions"]["gpu"]
    figures = {}
    for name, (title, unit, bar) in GPU_CHARTS.items():
        if bar.keys() <= result.keys():
            values = [(label, result[key] * scale, colour) for key, (label, scale, colour) in bar.items()]
            figures[f"{machine}_{name}"] = bars(f"{title}\n{where}", unit, values)
        else:
            print(f"{machine}: skipped {name}: not measured: {', '.join(sorted(bar.keys() - result.keys()))}")
    replicas = [
        (label + ("" if name in result else "\n(at least)"), result.get(name, result.get(f"{name}_at_least")), colour)
        for name, label, colour in (("replicas_stock", "stock", STOCK), ("replicas_wooly", "wooly", WOOLY))
    ]
    known = [(label, float(value), colour) for label, value, colour in replicas if value is not None]
    if len(known) == len(replicas):
        title = f"Engines at once ({result['capacity_kv_mib']:,} MiB of KV cache each)\n{where}"
        figures[f"{machine}_capacity"] = bars(title, "engines", known)
    else:
        print(f"{machine}: skipped capacity: not measured")
    return figures


def draw(results: Path) -> Figures:
    """Draw all result files in a directory."""

    def loaded(file: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    of_cpu: dict[str, Callable[[dict[str, Any]], Figures]] = {
        "cpu.json": cpu,
        "cpu-hf.json": hf_cpu,
        "scale.json": scale,
        "overcommit-sim.json": overcommit,
        "compute-sim.json": compute,
    }
    of_gpu: dict[str, Callable[[str, dict[str, Any]], Figures]] = {
        "gpu.json": gpu,
        "hf.json": hf_gpu,
        "overcommit.json": overcommit_gpu,
        "compute.json": compute_ways,
    }
    figures: Figures = {}
    for name, draw_cpu in of_cpu.items():
        if (results / name).exists():
            figures |= draw_cpu(loaded(results / name))
    for name, draw_gpu in of_gpu.items():
        for file in sorted(results.glob(f"*/{name}")):
            figures |= draw_gpu(file.parent.name, loaded(file))
    return figures


def main() -> None:
    """Draw all results, and write the files."""
    options = parser(__doc__)
    options.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files")
    arguments = options.parse_args()
    mpl.rcParams["svg.hashsalt"] = "wooly"  # otherwise the ids in a file are random
    figures = draw(arguments.results)
    plots = arguments.results / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(plots / f"{name}.svg", metadata={"Date": None})
        print(plots / f"{name}.svg")
    if not figures:
        print("no results to draw: run the benchmarks first")
