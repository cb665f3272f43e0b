"""The summary: all results in one flat file, ``results/summary.json``.

    python benchmarks summary [--check]

Results are in ``results/NAME.json`` or, by machine, in ``results/MACHINE/*.json``. The key of a figure begins with that
name: ``cpu.decode_reader_to_stock``, ``h100.attach_ms``. A median with its values is reduced to the median; texts,
versions and raw values are excluded. Computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import parser
from benchmarks.harness.results import RESULTS

SUMMARY = "summary.json"
LEFT_OUT = ("raw", "versions", "parts", "driver_cuda", "runtime_cuda")
UNNAMED = ("ratios",)
"""Groups whose name is not part of the key: the names of their figures are clear."""


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float | bool]]:
    """Yield all figures of a result, with their dotted names."""
    if isinstance(value, (bool, int, float)):
        yield ".".join(path), value
    elif isinstance(value, dict) and "median" in value:
        yield from figures(value["median"], path)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in LEFT_OUT:
                yield from figures(part, path if name in UNNAMED else (*path, name))


def summarize(results: Path) -> dict[str, float | bool]:
    """Return the figures of all result files below a directory.

    Raises:
        ValueError: Two files have a figure of the same name.
    """
    found: dict[str, float | bool] = {}
    files = [(file.stem, file) for file in sorted(results.glob("*.json")) if file.name != SUMMARY]
    files += [(file.parent.name, file) for file in sorted(results.glob("*/*.json"))]
    for machine, file in files:
        for name, value in figures(json.loads(file.read_text(encoding="utf-8"))):
            key = f"{machine}.{name}"
            if key in found:
                raise ValueError(f"{file} has {key}, and so does another file; rename one of them")
            found[key] = value
    return dict(sorted(found.items()))


def main() -> None:
    """Write the summary, or check it."""
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the summary is stale")
    options.add_argument("--results", type=Path, default=RESULTS, help="directory of the result files")
    arguments = options.parse_args()
    target = arguments.results / SUMMARY
    text = json.dumps(summarize(arguments.results), indent=1) + "\n"
    if not arguments.check:
        target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{target} is stale: run `python benchmarks summary`")
