"""wooly for vLLM: ``vllm serve MODEL --load-format wooly``, or any command line with ``WOOLYAI_WEIGHTS_DEDUP=1``.

vLLM calls :func:`register` in every process of an engine, through the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Make the load format ``wooly`` known to vLLM. Idempotent; touches no device and starts nothing.

    Where this vLLM has no longer what wooly needs, engines that ask for the load format end with advice; others, which
    have nothing to do with wooly, go on.
    """
    from shared_store.base.errors import ConfigError
    from wooly_vllm import compat

    try:
        _register()
    except ConfigError as error:
        compat.logger().error("wooly: nothing can be shared, and --load-format wooly is refused: %s", error)
        compat.refuse_format("wooly", error)


def _register() -> None:
    from shared_store.base import envs
    from wooly_vllm import compat, cpu_dispatch
    from wooly_vllm.loading.loader import AutoLoader, WoolyLoader
    from wooly_vllm.memory import accounting
    from wooly_vllm.residency import sleep as sleeping

    compat.when_on_gpu(accounting.install)
    compat.when_on_gpu(sleeping.install_in_engine)
    _log_with_vllm()
    if envs.CPU_DISPATCH.get():
        cpu_dispatch.install()
    compat.register_loader("wooly", WoolyLoader)
    if envs.WEIGHTS_DEDUP.get():
        compat.register_loader("auto", AutoLoader)


def _log_with_vllm() -> None:
    """Let the store's client log where vLLM does: its workers give other loggers no handler."""
    ours, theirs = logging.getLogger("shared_store"), logging.getLogger("vllm")
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    ours.setLevel(theirs.level or logging.INFO)
    ours.propagate = False
