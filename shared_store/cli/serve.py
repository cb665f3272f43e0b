"""``wooly serve``."""

import dataclasses
from typing import Annotated, Any, Final

import typer

from shared_store.base import envs
from shared_store.cli.options import RuntimeDir
from shared_store.cli.overcommit_options import (
    Arbiter,
    Budget,
    DeepAfter,
    HostBudget,
    IdleAfter,
    MaxHold,
    MaxPriority,
    MinResident,
    StartTimeout,
    SwapDir,
    Turn,
    VramReserve,
    priorities,
    sizes,
    value,
)

DETACHED_WITHIN_S: Final = 20.0


def command(
    *,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Run in the background; return once clients can connect. Log: store.log in the runtime directory.",
        ),
    ] = False,
    runtime_dir: RuntimeDir = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis-url",
            metavar="URL",
            help="Redis or Valkey server for the catalog.  [default: WOOLY_REDIS_URL, else an embedded server]",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="HOST:PORT",
            help="Serve HTTP there: /metrics (Prometheus), /healthz, /readyz.  [default: off]",
        ),
    ] = None,
    max_clients: Annotated[
        int, typer.Option("--max-clients", metavar="N", min=1, help="Maximum number of connections.")
    ] = 1024,
    max_resident: Annotated[
        list[str] | None,
        typer.Option(
            "--max-resident",
            metavar="DEVICE=SIZE",
            help="Memory limit on a device (cpu, or a GPU's UUID as in nvidia-smi -L), for example cpu=64GiB. At the "
            "limit, idle models are evicted. May be repeated.  [default: no limit]",
        ),
    ] = None,
    budget: Budget = None,
    vram_reserve: VramReserve = None,
    idle_after: IdleAfter = None,
    min_resident: MinResident = None,
    turn: Turn = None,
    deep_after: DeepAfter = None,
    host_budget: HostBudget = None,
    swap_dir: SwapDir = None,
    start_timeout: StartTimeout = None,
    max_priority: MaxPriority = None,
    arbiter: Arbiter = None,
    max_hold: MaxHold = None,
    compact_share: Annotated[
        float,
        typer.Option(
            "--compact-share",
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Unused fraction at which an idle store compacts a segment in host memory; 1 disables.",
        ),
    ] = 0.25,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="GROUP",
            help="Allow members of this group (name or number) to connect.  [default: only this user]",
        ),
    ] = None,
    allow_uid: Annotated[
        list[int] | None,
        typer.Option(
            "--allow-uid",
            metavar="UID",
            min=0,
            help="Allow this user id to connect. May be repeated.  [default: only this user]",
        ),
    ] = None,
    admin_uid: Annotated[
        list[int] | None,
        typer.Option(
            "--admin-uid",
            metavar="UID",
            min=0,
            help="Allow this user id to connect and administer: stop, upgrade, rm, pin, unpin, compact. May be "
            "repeated.  [default: WOOLY_ADMIN_UIDS; this user and root always may]",
        ),
    ] = None,
    admin_group: Annotated[
        str | None,
        typer.Option(
            "--admin-group",
            metavar="GROUP",
            help="Allow members of this group (name or number) to connect and administer.  "
            "[default: WOOLY_ADMIN_GROUP]",
        ),
    ] = None,
    watchdog: Annotated[
        float,
        typer.Option(
            "--watchdog",
            metavar="SECONDS",
            min=0,
            help="Restart a store that does not respond for this long; 0 disables.",
        ),
    ] = 30.0,
    log_level: Annotated[
        str | None,
        typer.Option(
            "--log-level",
            metavar="LEVEL",
            help="DEBUG, INFO, WARNING or ERROR.  [default: WOOLY_LOG_LEVEL, else INFO]",
        ),
    ] = None,
) -> None:
    """Run the store and its keeper in the foreground.

    Ctrl-C or SIGTERM stops both. The store allocates the shared memory. The keeper restarts it after a crash, with all
    models. The first engine starts both with default options, unless WOOLY_AUTOSTART=0. Use this command to set
    options, or in a service manager.

    \b
    Examples:
      wooly serve --detach
      wooly serve --max-resident cpu=64GiB --metrics 127.0.0.1:9400
      wooly serve --budget cpu=64GiB --idle-after 60s
      wooly serve --redis-url redis://catalog.example:6379/0
    """  # noqa: D301 - typer's mark for lines that are not wrapped
    from shared_store.memory import backend_for
    from shared_store.runtime.groups import gid_of
    from shared_store.runtime.options import ServeOptions

    given: dict[str, Any] = {
        "runtime_dir": runtime_dir,
        "redis_url": redis_url,
        "metrics_address": metrics,
        "max_clients": max_clients,
        "max_resident": sizes("--max-resident", max_resident or ()),
        "budget": sizes("--budget", budget or ()),
        "vram_reserve": value("--vram-reserve", envs.VRAM_RESERVE, vram_reserve),
        "idle_after_s": value("--idle-after", envs.IDLE_AFTER, idle_after),
        "min_resident_s": value("--min-resident", envs.MIN_RESIDENT, min_resident),
        "turn_s": value("--turn", envs.TURN, turn),
        "deep_after_s": value("--deep-after", envs.DEEP_AFTER, deep_after),
        "host_budget": value("--host-budget", envs.HOST_BUDGET, host_budget),
        "swap_dir": value("--swap-dir", envs.SWAP_DIR, None if swap_dir is None else str(swap_dir)),
        "start_timeout_s": value("--start-timeout", envs.START_TIMEOUT, start_timeout),
        "max_priority": priorities(max_priority or ()),
        "arbiter": arbiter,
        "max_hold_s": value("--max-hold", envs.MAX_HOLD, max_hold),
        "compact_share": compact_share,
        "socket_group": group,
        "allow_uids": tuple(allow_uid or ()),
        "admin_group": admin_group,
        "admin_uids": tuple(admin_uid) if admin_uid else None,
        "watchdog_s": watchdog,
        "log_level": value("--log-level", envs.LOG_LEVEL, log_level),
    }
    options = dataclasses.replace(
        ServeOptions.from_environment(), **{name: value for name, value in given.items() if value is not None}
    )
    # Refuse invalid options before anything is started.
    for device in {**options.max_resident, **options.budget}:
        backend_for(device)
    if metrics is not None:
        from shared_store.store.observe.endpoint import parse_address

        parse_address(metrics)
    for name in filter(None, (options.socket_group, options.admin_group)):
        gid_of(name)
    if detach:
        from shared_store.runtime.spawn import start_detached

        pid = start_detached(options, timeout_s=DETACHED_WITHIN_S)
        print(f"started a store (its keeper is pid {pid}) in {options.runtime_dir}")
    else:
        from shared_store.keeper.startup import run

        raise typer.Exit(run(options))
