"""``wooly upgrade``."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from shared_store.cli.options import Json, RuntimeDir, connect


def command(
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="Python interpreter of the new installation.  [default: the one that runs this command]",
        ),
    ] = None,
    *,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Replace the running store by this version, with all models.

    The store and its keeper are replaced by those of this installation. Nothing is loaded again. Engines continue and
    reconnect to the new store. If the new store does not start, the old one continues, and the exit code is 18. Only
    the store's user and root may upgrade.

    \b
    Examples:
      pip install -U wooly && wooly upgrade
      wooly upgrade --python /opt/wooly-2/bin/python
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    here = {
        name: value for name, value in os.environ.items() if name.startswith("PYTHON")
    }  # so that the store imports the same packages as this command
    interpreter = Path.cwd() / (python or sys.executable)  # not resolved: the link identifies the virtual environment
    with connect(runtime_dir) as session:
        before = session.store_version, session.store_pid
        started = time.monotonic()
        session.upgrade_store(str(interpreter), here)
        took_s = time.monotonic() - started
        after = session.store_version, session.store_pid
    if as_json:
        from shared_store.cli import render

        render.print_json(
            {
                "from": {"version": before[0], "pid": before[1]},
                "to": {"version": after[0], "pid": after[1]},
                "took_s": round(took_s, 3),
            }
        )
    else:
        print(f"upgraded wooly {before[0]} (pid {before[1]}) to {after[0]} (pid {after[1]}) in {took_s:.2f} s")
