"""Show a state again and again, until Ctrl-C."""

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from shared_store.cli import render

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")

INTERVAL_S = 2.0
"""Seconds between two refreshes."""

Watch = Annotated[bool, typer.Option("--watch", help="Refresh until interrupted (Ctrl-C).")]
Interval = Annotated[
    float | None,
    typer.Argument(metavar="SECONDS", min=0.1, show_default=False, help="Interval of --watch.  [default: 2]"),
]


def check(*, watch: bool, interval_s: float | None) -> None:
    """Raise :class:`typer.BadParameter` for an interval without ``watch``."""
    if interval_s is not None and not watch:
        raise typer.BadParameter("SECONDS goes with --watch")


def show(
    take: Callable[[], T],
    view: "Callable[[T], RenderableType]",
    *,
    watch: bool,
    interval_s: float | None,
    as_json: bool,
    json: Callable[[T], object] = lambda state: state,
) -> None:
    """Print a state once, or refresh it until interrupted: in place at a terminal, else one after the other.

    Args:
        take: returns the state.
        view: formats it. Called only without ``as_json``, so that it may import rich.
        watch: refresh it.
        interval_s: seconds between two refreshes; None: :data:`INTERVAL_S`.
        as_json: print the state as one line of JSON instead.
        json: returns the value to print then.
    """

    def once() -> None:
        if as_json:
            render.print_json(json(take()))
        else:
            render.console().print(view(take()))

    if not watch:
        once()
        return
    try:
        _refresh(once, take, view, interval_s or INTERVAL_S, in_place=sys.stdout.isatty() and not as_json)
    except KeyboardInterrupt:
        return  # the user ended it


def _refresh(
    once: Callable[[], None],
    take: Callable[[], T],
    view: "Callable[[T], RenderableType]",
    interval_s: float,
    *,
    in_place: bool,
) -> None:
    pause = threading.Event()
    if not in_place:
        while True:
            once()
            pause.wait(interval_s)
    from rich.live import Live

    with Live(console=render.console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(take()), refresh=True)
            pause.wait(interval_s)
