"""Options that several benchmarks have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

GPU_MODEL = Path("/tmp/wooly-bench-model")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_gpu_model(options: argparse.ArgumentParser) -> None:
    """Add ``--model``, the directory of the GPU benchmark's model."""
    options.add_argument(
        "--model", type=Path, default=GPU_MODEL, help=f"model on a GPU, made if missing (default {GPU_MODEL})"
    )


def add_lanes(options: argparse.ArgumentParser, description: str) -> None:
    """Add ``--lanes`` and ``--devices``; see :func:`devices_of_lanes`."""
    options.add_argument("--lanes", type=int, default=1, help=description)
    options.add_argument(
        "--devices",
        default=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        help="GPUs that the lanes use in turn, as in CUDA_VISIBLE_DEVICES (default: its value, or 0)",
    )


def devices_of_lanes(arguments: argparse.Namespace) -> list[str]:
    """Return the GPU of each lane."""
    listed = arguments.devices.split(",")
    return [listed[number % len(listed)] for number in range(arguments.lanes)]
