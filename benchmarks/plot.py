"""Draw the results: ``python benchmarks/plot.py`` writes SVG files to ``results/plots`` from the JSON beside it.

``cpu.json`` gives memory and speed by role; each ``MACHINE/gpu.json`` gives attaching, memory, speed and capacity;
``cpu-hf.json`` and each ``MACHINE/hf.json`` give transformers' memory, loading and speed. What has not been measured is
not drawn, and said. The same JSON gives the same bytes under one version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
STOCK, WOOLY, OTHER = "#9aa5b1", "#2f6f9f", "#c98a3b"
ROLES = {"stock": STOCK, "stock_dispatch": OTHER, "publisher": WOOLY, "reader": WOOLY}
LABELS = {"stock_dispatch": "stock,\nwooly's kernels"}
MIB, GIB = 1 << 20, 1 << 30

Bar = tuple[str, float, str]
"""A label, a height, and a colour."""


def bars(title: str, unit: str, values: Sequence[Bar]) -> Figure:
    """One bar a value, with the value written on it."""
    figure = Figure(figsize=(max(4.8, 1.6 + 1.25 * len(values)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.bar([label for label, _, _ in values], [value for _, value, _ in values])
    for bar, (_, _, colour) in zip(drawn, values, strict=True):
        bar.set_color(colour)
    axes.bar_label(drawn, labels=[f"{value:,.4g}" for _, value, _ in values], padding=2)
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.12 * max(value for _, value, _ in values) or 1)
    return figure


def pairs(title: str, unit: str, labels: Sequence[str], stock: Sequence[float], wooly: Sequence[float]) -> Figure:
    """Two bars a label: without and with wooly."""
    figure = Figure(figsize=(max(4.8, 1.6 + 1.5 * len(labels)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for side, (name, colour, values) in enumerate((("stock", STOCK, stock), ("wooly", WOOLY, wooly))):
        places = [place + 0.4 * side - 0.2 for place in range(len(labels))]
        drawn = axes.bar(places, values, width=0.38, label=name, color=colour)
        axes.bar_label(drawn, labels=[f"{value:,.3g}" for value in values], padding=2, fontsize="small")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.12 * max([*stock, *wooly]) or 1)
    axes.legend(frameon=False)
    return figure


def hf_cpu(result: dict[str, Any]) -> dict[str, Figure]:
    """Memory of eight processes, and time to load, by the way that a model is loaded."""
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
        "cpu_hf_memory": pairs(f"Memory of 8 processes with transformers\n{where}", "GiB", labels, *memory),
        "cpu_hf_load": pairs(f"from_pretrained in one more process\n{where}", "seconds", labels, *load),
    }


def hf_gpu(machine: str, result: dict[str, Any]) -> dict[str, Figure]:
    """GPU memory by the number of processes, time to load, and speed: each if it is there."""
    where = result["versions"]["gpu"]
    figures = {}
    counts = [count for count in (1, 2, 4, 8) if f"hf_vram_{count}_wooly_mib" in result]
    if counts:
        # What stock did not fit any more is a bar of no height.
        stock, wooly = (
            [result.get(f"hf_vram_{count}_{kind}_mib", 0) * MIB / GIB for count in counts]
            for kind in ("stock", "wooly")
        )
        labels = [f"{count} process{'es' if count > 1 else ''}" for count in counts]
        figures["memory"] = pairs(f"GPU memory with transformers\n{where}", "GiB", labels, stock, wooly)
        load: list[Bar] = [
            ("stock load", result["hf_load_s"], STOCK),
            ("wooly, the first\n(hash, load, publish)", result["hf_publish_s"], WOOLY),
            ("wooly attach", result["hf_attach_s"], WOOLY),
        ]
        figures["load"] = bars(f"from_pretrained onto the GPU\n{where}", "seconds", load)
    if "hf_tok_s_wooly" in result:
        rates: list[Bar] = [("stock", result["hf_tok_s_stock"], STOCK), ("wooly", result["hf_tok_s_wooly"], WOOLY)]
        figures["speed"] = bars(f"generate, 8 prompts x 128 tokens\n{where}", "tokens/s", rates)
    return {f"{machine}_hf_{name}": figure for name, figure in figures.items()}


def cpu(result: dict[str, Any]) -> dict[str, Figure]:
    """Memory and speed by role."""
    roles = {role: colour for role, colour in ROLES.items() if role in result}

    def of(name: str, scale: float = 1) -> list[Bar]:
        return [
            (LABELS.get(role, role), result[role][name]["median"] / scale, colour) for role, colour in roles.items()
        ]

    where = f"{result['model']}, {result['versions']['cpu']}"
    return {
        "cpu_memory": bars(f"Memory that a process answers for\n{where}", "MiB", of("memory_bytes", MIB)),
        "cpu_load": bars(f"Time to load or attach\n{where}", "seconds", of("load_s")),
        "cpu_decode": bars(f"Decode\n{where}", "tokens/s", of("tokens_per_s")),
    }


def gpu(machine: str, result: dict[str, Any]) -> dict[str, Figure]:
    """What there is of a GPU's figures; one figure's names are all there, or it is not drawn."""
    where = result["versions"]["gpu"]
    wanted: dict[str, tuple[str, str, dict[str, tuple[str, float, str]]]] = {
        "attach": (
            "The weights in one more process",
            "ms",
            {
                "load_s": ("stock load", 1e3, STOCK),
                "torch_ipc_attach_ms": ("torch CUDA IPC\n(no binding)", 1, OTHER),
                "attach_ms": ("wooly attach", 1, WOOLY),
                "attach_total_ms": ("wooly loader\nin all", 1, WOOLY),
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
            "A model and three fine-tunes of a tenth of its layers",
            "GiB",
            {
                "dedup_private_bytes": ("copies", 1 / GIB, STOCK),
                "dedup_expected_bytes": ("distinct tensors\nin the files", 1 / GIB, OTHER),
                "dedup_resident_bytes": ("in the store", 1 / GIB, WOOLY),
            },
        ),
    }
    figures = {}
    for name, (title, unit, bar) in wanted.items():
        if bar.keys() <= result.keys():
            values = [(label, result[key] * scale, colour) for key, (label, scale, colour) in bar.items()]
            figures[f"{machine}_{name}"] = bars(f"{title}\n{where}", unit, values)
        else:
            print(f"{machine}: {name} is not drawn: {', '.join(sorted(bar.keys() - result.keys()))} not measured")
    replicas = [
        (label + ("" if name in result else "\n(at least)"), result.get(name, result.get(f"{name}_at_least")), colour)
        for name, label, colour in (("replicas_stock", "stock", STOCK), ("replicas_wooly", "wooly", WOOLY))
    ]
    known = [(label, float(value), colour) for label, value, colour in replicas if value is not None]
    if len(known) == len(replicas):
        title = f"Engines that answer at once ({result['capacity_kv_mib']:,} MiB of KV cache each)\n{where}"
        figures[f"{machine}_capacity"] = bars(title, "engines", known)
    else:
        print(f"{machine}: capacity is not drawn: not measured")
    return figures


def main() -> None:
    """Draw everything that has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result files are")
    arguments = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "wooly"  # otherwise ids in the file are new each time
    figures: dict[str, Figure] = {}
    if (file := arguments.results / "cpu.json").exists():
        figures |= cpu(json.loads(file.read_text(encoding="utf-8")))
    for file in sorted(arguments.results.glob("*/gpu.json")):
        figures |= gpu(file.parent.name, json.loads(file.read_text(encoding="utf-8")))
    if (file := arguments.results / "cpu-hf.json").exists():
        figures |= hf_cpu(json.loads(file.read_text(encoding="utf-8")))
    for file in sorted(arguments.results.glob("*/hf.json")):
        figures |= hf_gpu(file.parent.name, json.loads(file.read_text(encoding="utf-8")))
    plots = arguments.results / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(plots / f"{name}.svg", metadata={"Date": None})
        print(plots / f"{name}.svg")
    if not figures:
        print("nothing has been measured: run the benchmarks first")


if __name__ == "__main__":
    main()
