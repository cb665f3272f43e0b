"""A fuzzer of the store's protocol: damaged conversations, with descriptors, through decoder, dispatch and handlers.

    python benchmarks fuzz [--executions 100000] [--seed 1] [--out FILE]

See ``tests/support/fuzzing.py`` for what an execution is. Each is one connection to one store in this process.

executions, frames, fds   connections, the frames that they sent, and the descriptors with them.
answers                   what the store answered: replies by type, errors by code.
ends                      why connections ended, with numbers left out.
crashes                   internal errors of the store; the exit code is 1 if there are any.
leaks                     descriptors that were left over.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from support.fuzzing import fuzz

from benchmarks.harness.arguments import parser
from benchmarks.harness.machine import host, stamp, wooly
from benchmarks.harness.results import RESULTS, write


def measure(executions: int, seed: int) -> dict[str, Any]:
    """Run the fuzzer, and return what it found."""
    logging.getLogger("shared_store").setLevel(logging.ERROR)  # each refused connection is a warning
    began = time.monotonic()
    outcome = dict(vars(fuzz(executions, seed)))
    took = time.monotonic() - began
    for name in ("answers", "ends"):
        outcome[name] = dict(sorted(outcome[name].items(), key=lambda found: -found[1])[:40])
    return {"versions": {**stamp(), **host(), **wooly()}, "seed": seed, "seconds": round(took, 1), **outcome}


def main() -> None:
    """Run the command line; write the result file."""
    arguments = parser(__doc__)
    arguments.add_argument("--executions", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--out", type=Path, default=RESULTS / "fuzz.json")
    options = arguments.parse_args()
    result = measure(options.executions, options.seed)
    print(json.dumps(result, indent=1))
    write(options.out, result)
    if result["crashes"] or result["leaks"]:
        sys.exit(1)
