"""Run a keeper and its store: ``python -m shared_store.keeper [RUNTIME_DIR [READY_FD [OPTIONS [HANDOVER_FD]]]]``.

:mod:`shared_store.runtime.spawn` and stores without a keeper start it with these arguments, which are described in
:mod:`shared_store.runtime.command`. They are an interface between versions. HANDOVER_FD is a memfd with the state of an
earlier keeper, options included (:mod:`shared_store.protocol.handover`).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import shared_store
from shared_store.keeper.startup import run, take_over
from shared_store.runtime.command import Arguments, exit_code


def main() -> int:
    """Run the keeper. Return its exit code; on an error, print one line to stderr first."""
    arguments = Arguments.parse(sys.argv)
    return exit_code(arguments, lambda: _run(arguments))


def _run(arguments: Arguments) -> int:
    if arguments.inherited is not None:
        _leave_directory()
        return take_over(arguments.inherited)
    options = arguments.serve_options()
    options = dataclasses.replace(options, runtime_dir=options.runtime_dir.absolute())
    _leave_directory()
    return run(options, ready=arguments.report_ready)


def _leave_directory() -> None:
    """Change to ``/``, so that the keeper keeps no file system busy. Stores still find the package."""
    here = str(Path(shared_store.__file__).parents[1])
    if here == str(Path.cwd()):  # imported because it was started there
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
