"""Run a store in the foreground: ``python -m shared_store.daemon [RUNTIME_DIR [READY_FD [OPTIONS [CONTROL_FD]]]]``.

A keeper starts its store with CONTROL_FD, a socket over which the store receives everything else. RUNTIME_DIR is then
for people who list processes. Without CONTROL_FD it is a store without a keeper. The arguments are described in
:mod:`shared_store.runtime.command`.
"""

from __future__ import annotations

import sys

from shared_store.runtime.command import Arguments, exit_code
from shared_store.store.app import run, run_kept


def main() -> int:
    """Run the store. Return its exit code; on an error, print one line to stderr first."""
    arguments = Arguments.parse(sys.argv)
    return exit_code(arguments, lambda: _run(arguments))


def _run(arguments: Arguments) -> int:
    if arguments.inherited is not None:
        return run_kept(arguments.inherited.detach())
    return run(arguments.serve_options(), ready=arguments.report_ready)


if __name__ == "__main__":
    sys.exit(main())
