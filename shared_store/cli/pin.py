"""``wooly pin``."""

from typing import Annotated

import typer

from shared_store.cli.options import RuntimeDir, connect


def command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The model's key, or an unambiguous beginning of it.")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Keep a model in the store, whether it is used or not.

    A model that nobody reads leaves when another one needs its room; a pinned one does not. `wooly rm` still removes
    it. One that is being published can be pinned, too. `wooly models` lists the keys.

    \b
    Example:
      wooly pin 3f9a
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    with connect(runtime_dir) as session:
        print(f"pinned {session.pin(key, pinned=True)}")
