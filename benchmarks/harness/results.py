"""Result files: JSON in ``benchmarks/results``, or in a folder of it named after the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import Figures
from benchmarks.harness.gpu import results_folder
from benchmarks.harness.machine import stamp
from benchmarks.harness.processes import BENCHMARKS

RESULTS = BENCHMARKS / "results"


def gpu_file(gpu: str, name: str) -> Path:
    """Return the path of a result file of a GPU, given the GPU's name."""
    return RESULTS / results_folder(gpu) / name


def read(file: Path) -> dict[str, Any]:
    """Return the content of a result file; empty if it does not exist."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def write(file: Path, result: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Replace a result file; a reader sees the old content or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8")
    fresh.replace(file)


def merge(file: Path, part: str, found: Figures, seconds: float, facts: dict[str, str]) -> None:
    """Write the figures of a part into a file, in place of those that it had for this part."""
    result = read(file) or {"parts": {}, "raw": {}}
    for name in result["parts"].get(part, {}).get("figures", ()):
        result.pop(name, None)
    for name in result["parts"].get(part, {}).get("raw", ()):
        result["raw"].pop(name, None)
    result["parts"][part] = {
        **stamp(),
        "seconds": round(seconds, 1),
        "figures": sorted(found.numbers),
        "raw": sorted(found.raw),
    }
    result["raw"] |= found.raw
    figures = {name: value for name, value in result.items() if name not in ("versions", "parts", "raw")}
    write(file, {"versions": facts, **figures, **found.numbers, "parts": result["parts"], "raw": result["raw"]})


def join(files: Iterable[Path], target: Path) -> None:
    """Merge the parts of several files of :func:`merge` into one. A part of a later file replaces an earlier one.

    A part from a file with other versions has these beside its date.

    Raises:
        SystemExit: the files are from different kinds of GPUs.
    """
    result = read(target)
    for file in files:
        found = read(file)
        versions = found["versions"]
        result = result or {"versions": versions, "parts": {}, "raw": {}}
        if result["versions"].get("gpu") != versions.get("gpu"):
            raise SystemExit(f"{file} is from another kind of GPU than the files before: {versions.get('gpu')}")
        other = {} if result["versions"] == versions else {"versions": versions}
        for part, known in found["parts"].items():
            facts = {**other, **known}
            for name in result["parts"].get(part, {}).get("figures", ()):
                result.pop(name, None)
            for name in result["parts"].get(part, {}).get("raw", ()):
                result["raw"].pop(name, None)
            result["parts"][part] = facts
            result |= {name: found[name] for name in facts["figures"]}
            result["raw"] |= {name: found["raw"][name] for name in facts["raw"]}
    figures = {name: value for name, value in result.items() if name not in ("versions", "parts", "raw")}
    write(target, {"versions": result["versions"], **figures, "parts": result["parts"], "raw": result["raw"]})
