"""``wooly rm``."""

from typing import Annotated

import typer

from shared_store.cli.options import RuntimeDir, connect


def command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The model's key, or an unambiguous beginning of it.")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Remove a model that nobody uses from the store.

    Its memory is freed, save for tensors that other models have too. `wooly models` lists the keys.

    \b
    Example:
      wooly rm 3f9a
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    with connect(runtime_dir) as session:
        print(f"removed {session.remove(key)}")
