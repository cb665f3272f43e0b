"""All results in one flat file: ``python benchmarks/summary.py`` writes it, ``--check`` says whether it is stale.

Results lie in ``results/NAME.json`` or, by machine, in ``results/MACHINE/*.json``; the key of a figure begins with that
name: ``cpu.decode_reader_to_stock``, ``h100.attach_ms``. Where a file has a median and the values that it is of, the
median counts; texts, versions and raw values stay behind. Nothing is computed here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SUMMARY = "summary.json"
LEFT_OUT = ("raw", "versions", "parts", "driver_cuda", "runtime_cuda")
UNNAMED = ("ratios",)
"""Groups whose name says nothing that the figures in them do not say."""


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float | bool]]:
    """Every figure of a result, by its dotted name."""
    if isinstance(value, (bool, int, float)):
        yield ".".join(path), value
    elif isinstance(value, dict) and "median" in value:
        yield from figures(value["median"], path)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in LEFT_OUT:
                yield from figures(part, path if name in UNNAMED else (*path, name))


def summarize(results: Path) -> dict[str, float | bool]:
    """The figures of all result files below a directory.

    Raises:
        ValueError: two files have a figure of the same name.
    """
    found: dict[str, float | bool] = {}
    files = [(file.stem, file) for file in sorted(results.glob("*.json")) if file.name != SUMMARY]
    files += [(file.parent.name, file) for file in sorted(results.glob("*/*.json"))]
    for machine, file in files:
        for name, value in figures(json.loads(file.read_text(encoding="utf-8"))):
            key = f"{machine}.{name}"
            if key in found:
                raise ValueError(f"{file} has {key}, which another file has too; rename one of them")
            found[key] = value
    return dict(sorted(found.items()))


def main() -> None:
    """Write the summary, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the summary is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result files are")
    arguments = parser.parse_args()
    target = arguments.results / SUMMARY
    text = json.dumps(summarize(arguments.results), indent=1) + "\n"
    if not arguments.check:
        target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{target} is not what the results say: run `python benchmarks/summary.py`")


if __name__ == "__main__":
    main()
