"""Options that several commands have, and what they mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.base import envs

if TYPE_CHECKING:
    from shared_store.client.session import Session

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir", metavar="DIR", help="The store's runtime directory.  [default: what WOOLY_RUNTIME_DIR says]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")]


def connect(runtime_dir: Path | None) -> "Session":
    """A session with the store that runs; never starts one. Raises :class:`StoreUnavailableError`."""
    import logging

    from shared_store.client.session import Session

    logging.basicConfig(level=envs.LOG_LEVEL.get(), format="%(message)s")
    return Session.connect(runtime_dir, name="wooly", autostart=False)
