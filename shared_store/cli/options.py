"""Options and arguments that several commands share, and the connection to the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.base import envs

if TYPE_CHECKING:
    from shared_store.client.session import Session

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        metavar="DIR",
        help="Runtime directory of the store.  "
        "[default: WOOLY_RUNTIME_DIR, else $XDG_RUNTIME_DIR/wooly or /tmp/wooly-UID]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes, times in seconds.")]
Key = Annotated[
    str,
    typer.Argument(metavar="KEY", help="Key of the model, or an unambiguous prefix. `wooly models` lists the keys."),
]


def connect(runtime_dir: Path | None) -> "Session":
    """Connect to the running store. Never starts one. Raises :class:`StoreUnavailableError`."""
    import logging

    from shared_store.client.session import Session

    logging.basicConfig(level=envs.LOG_LEVEL.get(), format="%(message)s")
    return Session.connect(runtime_dir, name="wooly", autostart=False, kind="cli")
