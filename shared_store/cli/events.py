"""``wooly events``."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_store.base import envs
from shared_store.base.errors import CatalogUnavailableError, StoreUnavailableError
from shared_store.cli import render
from shared_store.cli.options import Json, RuntimeDir, connect
from shared_store.runtime.node import node_id
from shared_store.runtime.paths import RuntimePaths

if TYPE_CHECKING:
    from shared_store.catalog.stream import EventEntry

_WIDTH = 18  # of a kind: the longest that stores write


def command(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones as they come, until Ctrl-C.")
    ] = False,
    last: Annotated[int, typer.Option("--last", metavar="N", min=0, help="How many that were there before.")] = 20,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="KIND", help="Of this kind alone. May be repeated.")
    ] = None,
    all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="Of every node whose store writes to the same catalog.")
    ] = False,
    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis-url",
            metavar="URL",
            help="The catalog's server.  [default: what WOOLY_REDIS_URL says, else what the store says]",
        ),
    ] = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show what happened: models published, attached and removed, fallbacks, the catalog lost and back.

    The events are read from the catalog's server, so that they are there without a store too, if the server is.

    \b
    Examples:
      wooly events --last 100
      wooly events --follow --kind fallback --kind publish_aborted
      wooly events --all-nodes --json | jq -r 'select(.kind == "published") | .fields.name'
    """  # noqa: D301 - the escape is typer's, for lines that stay as they are
    url, node = _where(runtime_dir, redis_url or envs.REDIS_URL.get(), all_nodes=all_nodes)
    from shared_store.catalog.stream import EventStream

    stream = EventStream(url, node=node, kinds=kind or ())
    with contextlib.closing(stream):
        for event in stream.last(last):
            _show(event, as_json=as_json, with_node=all_nodes)
        if follow:
            try:
                for event in stream.follow():
                    _show(event, as_json=as_json, with_node=all_nodes)
            except KeyboardInterrupt:
                return  # the way to end it


def _where(runtime_dir: Path | None, given: str | None, *, all_nodes: bool) -> tuple[str, str | None]:
    """The server's URL, and the node whose events are shown; None: all. Asks the store only for what is not known."""
    paths = RuntimePaths((runtime_dir or envs.RUNTIME_DIR.get()).absolute())
    node = None if all_nodes else node_id(paths.node_id)
    if given is not None and (all_nodes or node is not None):
        return given, node
    try:
        with connect(runtime_dir) as session:
            status = session.status()
    except StoreUnavailableError as error:
        missing = "which catalog to read" if given is None else "which node is meant"
        advice = "give --redis-url" if given is None else "give --all-nodes"
        raise CatalogUnavailableError(
            f"no store runs in {paths.directory} that could tell {missing}; {advice}, or start one: "
            "`wooly serve --detach`"
        ) from error
    return given or status.catalog.url, None if all_nodes else status.node.id


def _show(event: "EventEntry", *, as_json: bool, with_node: bool) -> None:
    if as_json:
        render.print_json(event)
        return
    time = datetime.fromtimestamp(event.time, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    node = f"{event.node}  " if with_node else ""
    fields = " ".join(f"{name}={_text(name, value)}" for name, value in event.fields.items() if value != "")
    print(render.plain(f"{time}  {node}{event.kind:<{_WIDTH}}  {fields}"), flush=True)


def _text(name: str, value: str | int) -> str:
    if name == "bytes" and isinstance(value, int):
        return render.size(value).replace(" ", "")
    return render.short_key(value) if name == "key" and isinstance(value, str) else str(value)
