"""The parity matrix as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
_HEAD = """# Parity

<!-- Written by `python benchmarks/parity.py --markdown` from benchmarks/results/parity.json. -->

For each row, stock vLLM, a publisher and a reader answered the same prompts greedily, each in a process of its own, on
a small random model of the architecture; *equal* means that all answers were the same, bit by bit, and *shared* how
much of its weights the reader maps from the store. *refused* means the same answers, but a model that wooly leaves to
stock vLLM, for the reason that is given; *stock-failed* that stock vLLM itself does not run it on that machine.
`python benchmarks/parity.py` makes these tables; what it compares is in `benchmarks/parity_rows.py`.
"""


def write(results: Path, page: Path, *, check: bool) -> None:
    """Write the page of a file of results, or exit with 1 if it is not what is there."""
    text = markdown(json.loads(results.read_text(encoding="utf-8"))["raw"])
    if not check:
        page.write_text(text, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{page} is not what the results say: run `python benchmarks/parity.py --markdown`")


def markdown(rows: Iterable[Found]) -> str:
    """The page: a table for each machine and version of vLLM, in the order of the rows."""
    tables: dict[tuple[str, str, str], list[Found]] = {}
    for row in rows:
        tables.setdefault((row["device"], row["versions"].get("vllm", "unknown"), row["driver"]), []).append(row)
    parts = [_HEAD]
    for (device, vllm, driver), found in tables.items():
        title = f"\n## {device}, vLLM {vllm}\n"
        where = f"Driver {driver}; " if driver else ""
        versions = sorted({f"torch {row['versions']['torch']}" for row in found if "torch" in row["versions"]})
        commits = ", ".join(sorted({row["commit"] for row in found}))
        parts.append(f"{title}\n{where}{', '.join(versions)}; wooly {commits}. {_counted(found)}.\n\n{_table(found)}")
    return "".join(parts)


def _counted(rows: Iterable[Found]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _table(rows: Iterable[Found]) -> str:
    return "\n".join(
        ("| model | quantization | dtype | graphs | | shared |", "|---|---|---|---|---|---|", *_lines(rows), "")
    )


def _lines(rows: Iterable[Found]) -> Iterator[str]:
    for row in rows:
        shared = f"{100 * row['shared_fraction']:.1f}%" if row["status"] == "equal" else _cell(row["reason"])
        graphs = "yes" if row["graphs"] else "no"
        quantization = "" if row["quantization"] == "none" else row["quantization"]
        yield f"| {row['model']} | {quantization} | {row['dtype']} | {graphs} | {row['status']} | {shared} |"


def _cell(text: str) -> str:
    """A text that does not end its cell, nor the table."""
    brief = text if len(text) <= 200 else f"{text[:200]}..."
    return brief.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
