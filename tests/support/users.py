"""Processes of other users. Needs root; the modules are imported before, as such a user may not read them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")

_IMPORTS = """
import contextlib, os, sys
from pathlib import Path
from shared_store.base.errors import WoolyError
from shared_store.cli import render, views
from shared_store.cli.app import main as command
from shared_store.client import compact
from shared_store.client.session import Session
from rich.console import Console
from rich.table import Table
from rich.text import Text
"""
_CONNECT = """
try:
    with Session.connect(Path(sys.argv[1]), autostart=False) as session:
        print("connected")
except WoolyError as error:
    print(f"{error.code}: {error}")
"""
_WARM = """
def main():
    try:
        return command()
    except SystemExit as end:
        return end.code
sys.argv[0] = "wooly"
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
    directory = os.environ.pop("WOOLY_RUNTIME_DIR")
    os.environ["WOOLY_RUNTIME_DIR"] = "/nonexistent"
    main()  # finds no store, and imports all that comes before
    os.environ["WOOLY_RUNTIME_DIR"] = directory
    render.console().print(render.table(("A",), [("b",)]))
"""
_COMMAND = """
sys.exit(main())
"""


def run_as(program, *arguments, before="", uid, gid=None, groups=(), **environment):
    """Run a Python program as another user, and return the ended process.

    Args:
        program: its text, which may use `Session`, `Path` and `WoolyError`.
        before: a program that runs before, as root.
        arguments: for `sys.argv`.
        uid: the user.
        gid: the primary group; by default the number of the user.
        groups: supplementary groups.
        environment: additional variables.
    """
    become = f"os.setgroups({list(groups)}); os.setgid({uid if gid is None else gid}); os.setuid({uid})\n"
    return subprocess.run(
        [sys.executable, "-c", _IMPORTS + before + become + program, *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def connect_as(directory, **user):
    """Connect as another user: `connected`, or the code and text of the error."""
    done = run_as(_CONNECT, directory, **user)
    return done.stdout.strip() or done.stderr.strip()


def wooly_as(*arguments, **user):
    """Run the `wooly` command as another user."""
    return run_as(_COMMAND, *arguments, before=_WARM, **user)
