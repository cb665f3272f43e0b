"""wooly for vLLM: ``vllm serve MODEL --load-format wooly``, or any command line with ``WOOLYAI_WEIGHTS_DEDUP=1``.

vLLM calls :func:`register` in every process of an engine, through the entry point ``vllm.general_plugins``. The public
names are those of :data:`__all__`, and the command ``python -m wooly_vllm.canary``.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Register the load format ``wooly`` with vLLM. Idempotent; touches no device and starts no process.

    If this vLLM has moved a name that wooly relies on, engines that request the load format fail with advice. Engines
    with other load formats start as ever.
    """
    from shared_store.base.errors import ConfigError
    from wooly_vllm import compat

    try:
        _register()
    except ConfigError as error:
        compat.logger().error("wooly: cannot share weights, --load-format wooly is refused: %s", error)
        compat.refuse_format("wooly", error)


def _register() -> None:
    from shared_store.base import envs
    from shared_store.base.errors import ConfigError
    from wooly_vllm import compat, cpu_dispatch
    from wooly_vllm.loading.loader import AutoLoader, WoolyLoader
    from wooly_vllm.memory import accounting
    from wooly_vllm.residency import activity, engine, sleep

    compat.call_on_gpu(accounting.install)
    compat.call_on_gpu(sleep.install_in_engine)
    activity.install_in_engine()
    try:
        engine.install()
    except ConfigError as error:
        compat.logger().warning("wooly: engines of this vLLM are no workloads, and never swapped out: %s", error)
    _log_with_vllm()
    if envs.CPU_DISPATCH.get():
        cpu_dispatch.install()
    compat.register_loader("wooly", WoolyLoader)
    if envs.WEIGHTS_DEDUP.get():
        compat.register_loader("auto", AutoLoader)


def _log_with_vllm() -> None:
    """Give the logger of ``shared_store`` vLLM's handlers: its workers configure no others."""
    ours, theirs = logging.getLogger("shared_store"), logging.getLogger("vllm")
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    ours.setLevel(theirs.level or logging.INFO)
    ours.propagate = False
