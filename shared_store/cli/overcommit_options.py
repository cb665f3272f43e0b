"""Options of ``wooly serve`` for overcommit and compute. Each but the first two has a variable, which it overrides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from shared_store.base import envs
from shared_store.base.errors import ConfigError
from shared_store.base.sizes import parse_size

T = TypeVar("T")

Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="DEVICE=SIZE",
        help="Memory that all workloads on a device may use together, private and shared (cpu, or a GPU's UUID), for "
        "example cpu=64GiB. May be repeated.  [default: the physical memory]",
    ),
]
MaxPriority = Annotated[
    list[str] | None,
    typer.Option(
        "--max-priority",
        metavar="UID=P",
        help="Highest priority that workloads of this user may have, for example 1000=2. May be repeated.  "
        "[default: any]",
    ),
]
VramReserve = Annotated[
    str | None,
    typer.Option(
        "--vram-reserve",
        metavar="SIZE",
        help="Memory that stays free on each device.  [default: WOOLY_VRAM_RESERVE, else 2GiB; on cpu 256MiB]",
    ),
]
IdleAfter = Annotated[
    str | None,
    typer.Option(
        "--idle-after",
        metavar="DURATION",
        help="Time without work after which a workload may be swapped out to restore the reserve.  "
        "[default: WOOLY_IDLE_AFTER, else 300s]",
    ),
]
MinResident = Annotated[
    str | None,
    typer.Option(
        "--min-resident",
        metavar="DURATION",
        help="Time for which an idle workload stays after its return.  [default: WOOLY_MIN_RESIDENT, else 2s]",
    ),
]
Turn = Annotated[
    str | None,
    typer.Option(
        "--turn",
        metavar="DURATION",
        help="Time for which a busy workload stays after its return, while others of its priority wait.  "
        "[default: WOOLY_TURN, else 5s]",
    ),
]
DeepAfter = Annotated[
    str | None,
    typer.Option(
        "--deep-after",
        metavar="DURATION",
        help="Time without work after which the driver takes a swapped workload off its GPU; 0: never.  "
        "[default: WOOLY_DEEP_AFTER, else 30m]",
    ),
]
HostBudget = Annotated[
    str | None,
    typer.Option(
        "--host-budget",
        metavar="SIZE",
        help="Host memory for copies of swapped workloads and shared weights.  "
        "[default: WOOLY_HOST_BUDGET, else half of the free host memory]",
    ),
]
SwapDir = Annotated[
    Path | None,
    typer.Option(
        "--swap-dir",
        metavar="DIR",
        help="Directory for copies that do not lie in host memory.  "
        "[default: WOOLY_SWAP_DIR, else /var/tmp unless it is on tmpfs]",
    ),
]
StartTimeout = Annotated[
    str | None,
    typer.Option(
        "--start-timeout",
        metavar="DURATION",
        help="Longest time for which a start waits for memory.  [default: WOOLY_START_TIMEOUT, else 540s]",
    ),
]
Arbiter = Annotated[
    bool | None,
    typer.Option(
        "--arbiter/--no-arbiter",
        help="Let workloads of one device compute by priority and share, or as the driver lets them.  "
        "[default: WOOLY_ARBITER, else --arbiter]",
        show_default=False,
    ),
]
MaxHold = Annotated[
    str | None,
    typer.Option(
        "--max-hold",
        metavar="DURATION",
        help="Time after which a workload that is held for a more important one makes one step; 0: none.  "
        "[default: WOOLY_MAX_HOLD, else 0]",
    ),
]


def value(option: str, variable: envs.Variable[T], text: str | None) -> T | None:
    """Parse an option as its variable; None: not given. Raises :class:`ConfigError`, which names the option."""
    if text is None:
        return None
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from error


def sizes(option: str, texts: Sequence[str]) -> Mapping[str, int]:
    """Parse ``DEVICE=SIZE`` to bytes by device. Raises :class:`ConfigError`, which names the option."""
    return dict(size(option, text) for text in texts)


def size(option: str, text: str) -> tuple[str, int]:
    """Parse one ``DEVICE=SIZE``. Raises :class:`ConfigError`, which names the option."""
    device, equals, given = text.partition("=")
    nbytes = parse_size(given)
    if not (device and equals) or nbytes is None:
        raise ConfigError(
            f"{option} {text!r} is not of the form DEVICE=SIZE, such as cpu=64GiB; "
            "a size is a number with KiB, MiB, GiB or TiB"
        )
    return device, nbytes


def priorities(texts: Sequence[str]) -> Mapping[int, int]:
    """Parse ``--max-priority UID=P`` to priorities by user id. Raises :class:`ConfigError`."""
    found = {}
    for text in texts:
        uid, equals, priority = text.partition("=")
        if not (uid.isascii() and uid.isdigit() and equals):
            raise ConfigError(f"--max-priority {text!r} is not of the form UID=P, such as 1000=2")
        try:
            found[int(uid)] = envs.PRIORITY.parse(priority)
        except ValueError as error:
            raise ConfigError(f"--max-priority {text!r}: {error}") from error
    return found
