"""The ``wooly`` command: a client of the store, one command a file.

A command imports its dependencies when it runs, so that ``--help`` and completion are fast. An error is one line on
stderr with its code, and the exit code. Only results go to stdout.
"""

from shared_store.cli.app import app, main

__all__ = ["app", "main"]
