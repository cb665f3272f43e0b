"""Write reference pages from the code: commands, metrics, errors and messages, each as Markdown.

The text is the code's own (help texts, docstrings, metric descriptions), so a page cannot differ from the program.
Imports no engine, no Redis and no torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import click
import msgspec
import typer
from prometheus_client.metrics_core import Metric

from shared_store.base import errors, status
from shared_store.cli import app
from shared_store.protocol import messages
from shared_store.store.observe.exposition import StatusCollector

_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
_LITERAL = re.compile(r"``(.+?)``")


def commands() -> str:
    """Return the page of every command, with its usage, arguments and options as ``--help`` prints them."""
    group = typer.main.get_command(app)
    parts = [
        "# Every option\n",
        (
            "Generated from the commands' own help texts; `wooly COMMAND --help` prints the same. What commands mean, "
            "their output and their exit codes are on [The wooly command](../cli.md).\n"
        ),
    ]
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # a group, which typer does not say
        context = click.Context(command, info_name=f"wooly {name}")
        parts += [f"## wooly {name}\n", f"```\n{_usage(command, context)}\n```\n", *_help(command.help or "")]
        rows = [(_named(parameter), _described(parameter)) for parameter in command.params]
        parts += _table(("argument or option", "meaning"), rows)
    return "\n".join(parts)


def _usage(command: click.Command, context: click.Context) -> str:
    return f"{context.info_name} {' '.join(command.collect_usage_pieces(context))}"


def _help(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield f"```\n{paragraph.removeprefix(chr(8)).strip()}\n```\n"
        else:
            yield f"{' '.join(paragraph.split())}\n"


def _named(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])


def _described(parameter: Any) -> str:
    text = " ".join((parameter.help or "").split())
    if parameter.metavar and parameter.param_type_name == "option":
        text = f"`{parameter.metavar}`. {text}"
    shown = parameter.default not in (None, False, True, (), []) and "[default" not in text
    return f"{text}  [default: {parameter.default}]" if shown else text


def metrics() -> str:
    """Return the page of every metric that the store exposes, with type, labels and description."""
    rows = []
    for family in StatusCollector(_empty_status()).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, _labels(family), family.documentation))
    return "\n".join(
        [
            "# Metrics\n",
            (
                "Generated from the store's exposition. `wooly serve --metrics HOST:PORT` serves them at `/metrics`; "
                "[Operations](../operations.md#monitoring) has the dashboard and the alerts. A histogram has the "
                "suffixes `_bucket`, `_sum` and `_count`.\n"
            ),
            *_table(("metric", "type", "labels", "meaning"), rows),
        ]
    )


def _labels(family: Metric) -> str:
    names = getattr(family, "_labelnames", ())  # public in no version of prometheus-client
    return ", ".join(f"`{name}`" for name in names)


def _empty_status() -> status.Status:
    """Return a status of the right types; the names of metrics do not depend on the values."""
    empty = msgspec.convert(_example(status.Status), status.Status)
    pauses = status.PauseStatus(0, 0.0, 0.0, (0,) * (len(status.PAUSE_BOUNDS_S) + 1))  # a count for each bound
    return msgspec.structs.replace(empty, loop=status.LoopStatus(pauses, pauses))


def _example(kind: Any) -> Any:
    found = msgspec.inspect.type_info(kind)
    return _example_of(found)


def _example_of(found: Any) -> Any:
    match found:
        case msgspec.inspect.StructType():
            return {field.encode_name: _example_of(field.type) for field in found.fields}
        case msgspec.inspect.UnionType():
            return _example_of(next(one for one in found.types if not isinstance(one, msgspec.inspect.NoneType)))
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType():
            return []
        case msgspec.inspect.DictType():
            return {}
        case msgspec.inspect.LiteralType():
            return found.values[0]
        case msgspec.inspect.StrType():
            return ""
        case msgspec.inspect.BoolType():
            return False
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return 0
        case _:
            raise TypeError(f"no example of {found!r}; add one to docs/site/reference.py")


def failures() -> str:
    """Return the page of every error class: its code, its exit code and its meaning."""
    classes = sorted(_subclasses(errors.WoolyError), key=lambda cls: (cls.exit_code, cls.code))
    rows = [(f"`{cls.code}`", str(cls.exit_code), _inline(cls)) for cls in classes]
    return "\n".join(
        [
            "# Errors and exit codes\n",
            (
                "Generated from the error classes. The code is in brackets at the end of every message of the `wooly` "
                "command, in warnings of engines, and in events; it is stable. The exit code is that of the command.\n"
            ),
            *_table(("code", "exit code", "meaning"), rows),
        ]
    )


def _subclasses(cls: type[errors.WoolyError]) -> set[type[errors.WoolyError]]:
    return {cls, *(found for direct in cls.__subclasses__() for found in _subclasses(direct))}


def every_message() -> str:
    """Return the page of every message: tag, fields with types and defaults, and meaning."""
    parts = [
        "# Every message\n",
        (
            "Generated from the message structs. A message is a msgpack map whose `type` is the tag; the keys are the "
            "fields, in any order. Conversations, limits and errors are on [The protocol](../protocol.md).\n"
        ),
    ]
    for title, union in (("From a client", messages.ClientMessage), ("From the store", messages.StoreMessage)):
        parts.append(f"## {title}\n")
        for cls in get_args(union):
            parts += [f"### {cls.__name__}\n", f"Type `{cls.__struct_config__.tag}`. {_first(cls)}\n", *_rest(cls)]
            rows = [
                (f"`{field.encode_name}`", f"`{_type(field.type)}`", _default(field))
                for field in msgspec.structs.fields(cls)
            ]
            parts += _table(("field", "type", "default"), rows)
    return "\n".join(parts)


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("|", "or")


def _default(field: Any) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()!r}`"
    return "" if field.default is msgspec.NODEFAULT else f"`{field.default!r}`"


def _paragraphs(cls: type) -> list[str]:
    text = _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", inspect.getdoc(cls) or ""))
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _first(cls: type) -> str:
    return _paragraphs(cls)[0]


def _rest(cls: type) -> Iterator[str]:
    yield from (f"{paragraph}\n" for paragraph in _paragraphs(cls)[1:])


def _inline(cls: type) -> str:
    return " ".join(_paragraphs(cls))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return []
    lines = [head, ["---"] * len(head), *cells]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"]


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/metrics.md": metrics,
    "reference/errors.md": failures,
    "reference/messages.md": every_message,
}
"""Path in the site, and the function that writes the page."""
