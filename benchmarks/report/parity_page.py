"""The parity matrix as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
_HEAD = """# Parity

<!-- Written by `python benchmarks parity --markdown` from benchmarks/results/parity.json. -->

For each row, stock vLLM, a publisher and a reader answered the same prompts with greedy decoding, each in a process of
its own, on a small random model of the architecture. *equal*: all answers are equal bit by bit; *shared* is the part of
its weights that the reader maps from the store. *refused*: the answers are equal, but wooly does not share the model,
for the given reason. *stock-failed*: stock vLLM itself does not run the row on that machine.
`python benchmarks parity` makes these tables; the rows are defined in `benchmarks/parity/rows.py`.
"""


def write(results: Path, page: Path, *, check: bool) -> None:
    """Write the page of a result file; with ``check``, exit with 1 if the existing page differs."""
    text = markdown(json.loads(results.read_text(encoding="utf-8"))["raw"])
    if not check:
        page.write_text(text, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{page} is stale: run `python benchmarks parity --markdown`")


def markdown(rows: Iterable[Found]) -> str:
    """Return the page: one table for each machine and version of vLLM, in the order of the rows."""
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
    """Return a text, shortened and escaped for a table cell."""
    brief = text if len(text) <= 200 else f"{text[:200]}..."
    return brief.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
