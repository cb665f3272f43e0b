"""The parity matrix: compare shared weights with stock vLLM, for all models, formats and types that people serve.

A row is a model, a quantization, a dtype, and the use of CUDA graphs (``parity/rows.py``). For each row, three real
vLLM engines answer the same prompts: stock, a publisher, and a reader while the publisher runs. Each is a process of
its own, which is reused for rows of the same kind (dense and sparse models do not share one). Answers are greedy
tokens, or embeddings, and are compared bit by bit.

    python benchmarks parity [--list] [--rows REGEX] [--missing] [--lanes 4] [--budget-s 540]
    python benchmarks parity --markdown [--check]

equal         both answer as stock does, and the reader maps the weights: ``shared_fraction`` of them.
refused       both answer as stock does, but wooly does not share this model, for a reason that it logs.
differs       an answer is not stock's. This is a defect.
failed        stock answers, but an engine with wooly does not.
stock-failed  stock vLLM itself does not run this row on this machine.

Skips rows that are not for this machine: without a GPU, only rows marked for it run. Writes the results after each row
into ``--output``; rows that do not run keep theirs. Makes missing models in ``--models``, without a network.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from support.models.cache import CACHE

from benchmarks.harness.arguments import add_lanes, devices_of_lanes, parser
from benchmarks.harness.processes import BENCHMARKS
from benchmarks.harness.results import RESULTS
from benchmarks.parity.lanes import Options, Run, run_lanes
from benchmarks.parity.machine import machine
from benchmarks.parity.results import Results
from benchmarks.parity.rows import ROWS
from benchmarks.report import parity_page


def main() -> None:
    """Run rows, list them, or write the page."""
    options = parser(__doc__)
    options.add_argument(
        "--rows", type=re.compile, default=re.compile(""), metavar="REGEX", help="pattern of names (default: all)"
    )
    options.add_argument("--list", action="store_true", help="print the names of this machine's rows, and exit")
    options.add_argument("--missing", action="store_true", help="only rows without a result on this kind of machine")
    add_lanes(options, "rows that run at the same time, with three engines each (default 1)")
    options.add_argument("--timeout-s", type=float, default=400, help="limit for one row, in seconds (default 400)")
    options.add_argument(
        "--budget-s", type=float, default=float("inf"), help="no row begins after this time, in seconds (default: none)"
    )
    options.add_argument(
        "--unproven",
        action="store_true",
        help="also share layers whose method is in no table of wooly_vllm/loading/methods.py, to compare them",
    )
    options.add_argument("--models", type=Path, default=CACHE, help="directory of the checkpoints")
    options.add_argument("--logs", type=Path, help="directory to which the logs of the engines are copied")
    options.add_argument("--output", "--json", type=Path, default=RESULTS / "parity.json", help="result file")
    options.add_argument("--markdown", action="store_true", help="run nothing; write the page from the results")
    options.add_argument("--page", type=Path, default=BENCHMARKS.parent / "docs" / "parity.md", help="file of the page")
    options.add_argument("--check", action="store_true", help="with --markdown: exit with 1 if the page is stale")
    arguments = options.parse_args()
    if arguments.markdown:
        parity_page.write(arguments.output, arguments.page, check=arguments.check)
        return
    here = machine()
    rows = [row for row in ROWS.values() if arguments.rows.search(row.name) and (row.gpu if here.on_gpu else row.cpu)]
    results = Results(arguments.output, here)
    if arguments.missing:
        rows = [row for row in rows if not results.has(row)]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers, which makes the models
    settings = Options(
        arguments.models, arguments.logs, arguments.timeout_s, arguments.budget_s, unproven=arguments.unproven
    )
    run = Run(rows, results, here, settings)
    run_lanes(run, devices_of_lanes(arguments))
    if left := run.left():
        print(f"not run within the budget: {', '.join(left)}", flush=True)
    bad = []
    while not run.outcomes.empty():
        row, outcome = run.outcomes.get()
        bad += [row.name] if outcome.status in ("differs", "failed") else []
    if bad:
        sys.exit(f"differs or failed: {', '.join(bad)}")
