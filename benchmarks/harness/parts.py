"""Benchmarks made of parts: select them on the command line, run them, and write the results after each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.harness.figures import Figures
from benchmarks.harness.processes import ChildError
from benchmarks.harness.results import merge


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return an argparse type for a comma-separated selection of ``names``."""
    valid = list(names)

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in valid]:
            raise argparse.ArgumentTypeError(f"unknown name {', '.join(unknown)}; valid names: {', '.join(valid)}")
        return text.split(",")

    return parse


def run_parts(
    parts: Mapping[str, Callable[[], Figures]], selected: Iterable[str], file: Path, facts: dict[str, str]
) -> None:
    """Run parts and merge the figures of each into ``file``. Exits with a message if a part failed."""
    failed = []
    for part in selected:
        began = time.monotonic()
        try:
            found = parts[part]()
        except ChildError as error:
            failed.append(part)
            print(f"{part}: failed after {time.monotonic() - began:.0f} s: {error}", flush=True)
            continue
        merge(file, part, found, time.monotonic() - began, facts)
        print(f"{part} ({time.monotonic() - began:.0f} s): {json.dumps(found.numbers)}", flush=True)
    if failed:
        raise SystemExit(f"no result for: {', '.join(failed)}")
