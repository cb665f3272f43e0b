"""Text for people: sizes, durations, tables. JSON is not made here; it has the exact numbers."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
KEY_SHOWN: Final = 12
"""Digits of a key in tables: enough to tell models apart, and to give to ``wooly rm``."""


def size(nbytes: int) -> str:
    """Bytes as ``1.5 GiB``; three significant digits."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds as ``3 d 4 h``: the two largest units."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def plain(text: str) -> str:
    """What a client said about itself, without characters that a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short_key(key: str) -> str:
    """The beginning of a key."""
    return plain(key[:KEY_SHOWN])


def console() -> "Console":
    """Where tables go. Not a terminal: no colours, and lines as long as they are, for other programs to cut."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    colours: Literal["auto"] | None = "auto" if terminal else None
    return Console(width=None if terminal else 1000, color_system=colours, highlight=False, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """A table without lines; a column whose name begins with ``>`` is set flush right."""
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
    """One line of JSON, of anything that msgspec encodes."""
    import msgspec

    print(msgspec.json.encode(value).decode(), flush=True)
