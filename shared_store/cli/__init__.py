"""The ``wooly`` command: a client of the store, one command a file.

A command imports what it needs when it runs, so that ``--help`` and completion are quick. What goes wrong is told in
one line on stderr with the error's code, and by its exit code; results alone go to stdout.
"""

from shared_store.cli.app import app, main

__all__ = ["app", "main"]
