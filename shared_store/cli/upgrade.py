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
            "--python", metavar="PATH", help="Interpreter of the installation to change to.  [default: this command's]"
        ),
    ] = None,
    *,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Replace the store and its keeper by this installation's, with all models.

    Nothing is loaded again. Engines go on, and join the new store by themselves.

    \b
    Examples:
      pip install -U wooly && wooly upgrade
      wooly upgrade --python /opt/wooly-2/bin/python
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    here = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}  # as it would run here
    interpreter = Path.cwd() / (python or sys.executable)  # not resolved: a link is what makes a virtual environment
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
        print(f"wooly {before[0]} (pid {before[1]}) made room for {after[0]} (pid {after[1]}) in {took_s:.2f} s")
