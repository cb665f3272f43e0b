"""Format sizes, durations and tables for people. JSON has exact numbers."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from shared_store.base.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

KEY_SHOWN: Final = 12
"""Digits of a key in tables: enough to identify a model, also in commands that accept a prefix."""


def size(nbytes: int) -> str:
    """Format bytes as ``1.5 GiB``, with three significant digits."""
    return format_size(nbytes)


def duration(seconds: float) -> str:
    """Format seconds as ``3 d 4 h``, with the two largest units."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def plain(text: str) -> str:
    """Replace the control characters of a client's text, which a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short_key(key: str) -> str:
    """Return the first digits of a key."""
    return plain(key[:KEY_SHOWN])


def console() -> "Console":
    """Return the console on stdout. Without a terminal, it prints no colours and folds no lines."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    colours: Literal["auto"] | None = "auto" if terminal else None
    return Console(width=None if terminal else 1000, color_system=colours, highlight=False, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Build a table without borders. A column whose name starts with ``>`` is right-aligned."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def print_json(value: object) -> None:
    """Print a value that msgspec can encode as one line of JSON."""
    import msgspec

    print(msgspec.json.encode(value).decode(), flush=True)
