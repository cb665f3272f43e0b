"""Processes of the benchmark ``hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.node import Node
from benchmarks.harness.processes import Child

COUNTS = (1, 2, 4, 8)
"""Numbers of processes at which memory is measured."""


def launch(node: Node, kind: str, number: int, model: Path, **job: Any) -> Child:
    """Start a process that loads the model on request (``workers/hf.py``)."""
    full = {"model": str(model), "wooly": kind == "wooly", "device": "cpu", "dtype": "bfloat16", "adapter": None}
    return node.launch(f"{kind} {number}", "model", {**full, **job}, worker="hf-worker", WOOLY_STRICT="1")


def fill_page_cache(model: Path) -> None:
    """Read every file of a checkpoint once."""
    for file in model.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
