"""``wooly unpin``."""

from typing import Annotated

import typer

from shared_store.cli.options import RuntimeDir, connect


def command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The model's key, or an unambiguous beginning of it.")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Let a pinned model leave again, when nobody reads it and its room is needed.

    \b
    Example:
      wooly unpin 3f9a
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    with connect(runtime_dir) as session:
        print(f"unpinned {session.pin(key, pinned=False)}")
