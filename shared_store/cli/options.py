"""Options and arguments that several commands share, and the connection to the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.base import envs
from shared_store.base.errors import UnsupportedError, WoolyError

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


def _names(incomplete: str) -> list[str]:
    """Return the names of workloads that begin with a text, for the shell's completion; none without a store."""
    from shared_store.client.session import Session

    try:
        with Session.connect(name="wooly", autostart=False, kind="cli") as session:
            return [one.name for one in session.status().workloads if one.name.startswith(incomplete)]
    except WoolyError:
        return []


WorkloadName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the workload. `wooly workloads` lists the names.",
        autocompletion=_names,
    ),
]


def connect(runtime_dir: Path | None) -> "Session":
    """Connect to the running store. Never starts one. Raises :class:`StoreUnavailableError`."""
    import logging

    from shared_store.client.session import Session

    logging.basicConfig(level=envs.LOG_LEVEL.get(), format="%(message)s")
    return Session.connect(runtime_dir, name="wooly", autostart=False, kind="cli")


def connect_for_workloads(runtime_dir: Path | None) -> "Session":
    """Connect to the running store. Raises :class:`UnsupportedError` for one that does not list workloads."""
    from shared_store.protocol import messages

    session = connect(runtime_dir)
    if not session.supports(messages.WORKLOADS):
        version = session.store_version
        session.close()
        raise UnsupportedError(
            f"the store has version {version}, which lists no workloads; `wooly upgrade` replaces it"
        )
    return session
