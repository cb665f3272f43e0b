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
    from shared_store.catalog.event_stream import EventEntry

_WIDTH = 21  # characters of the longest kind


def command(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new events as they arrive, until Ctrl-C.")
    ] = False,
    last: Annotated[int, typer.Option("--last", metavar="N", min=0, help="Number of past events to print.")] = 20,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Print only events of this kind. May be repeated.  [default: all kinds]"
        ),
    ] = None,
    all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="Print events of all nodes in the catalog, not only of this node.")
    ] = False,
    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis-url",
            metavar="URL",
            help="Server of the catalog.  [default: WOOLY_REDIS_URL, else the server of the running store]",
        ),
    ] = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Print recent events of this node.

    For example models that were published, attached to or evicted, fallbacks, and restarts of the store. Events are
    read from the catalog (Redis or Valkey), which retains about the last 10,000. With --redis-url the store need not
    run. The embedded catalog ends with the store. Exit code 21: the catalog does not answer. Kinds of events:
    docs/cli.md.

    \b
    Examples:
      wooly events --last 100
      wooly events --follow --kind fallback --kind publish_aborted
      wooly events --all-nodes --json | jq -r 'select(.kind == "published") | .fields.name'
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    url, node = _where(runtime_dir, redis_url or envs.REDIS_URL.get(), all_nodes=all_nodes)
    from shared_store.catalog.event_stream import EventStream

    stream = EventStream(url, node=node, kinds=kind or ())
    with contextlib.closing(stream):
        for event in stream.last(last):
            _show(event, as_json=as_json, with_node=all_nodes)
        if follow:
            try:
                for event in stream.follow():
                    _show(event, as_json=as_json, with_node=all_nodes)
            except KeyboardInterrupt:
                return  # the user ended it


def _where(runtime_dir: Path | None, given: str | None, *, all_nodes: bool) -> tuple[str, str | None]:
    """Return the server's URL and the node to show (None: all nodes). Connects to the store only if one is unknown."""
    paths = RuntimePaths((runtime_dir or envs.RUNTIME_DIR.get()).absolute())
    node = None if all_nodes else node_id(paths.node_id)
    if given is not None and (all_nodes or node is not None):
        return given, node
    try:
        with connect(runtime_dir) as session:
            status = session.status()
    except StoreUnavailableError as error:
        unknown = "URL of the catalog" if given is None else "name of this node"
        advice = "pass --redis-url" if given is None else "pass --all-nodes"
        raise CatalogUnavailableError(
            f"the {unknown} is unknown, because no store is running in {paths.directory}; {advice}, or start a store: "
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
    if name == "pid" and value == 0:
        return "unknown"  # a process of another PID namespace
    if name == "bytes" and isinstance(value, int):
        return render.size(value).replace(" ", "")
    return render.short_key(value) if name == "key" and isinstance(value, str) else str(value)
