"""Makes transformers know wooly without ``import wooly_hf``, in every process that imports torch.

torch calls :func:`activate` at the end of its own import, and takes an exception in it for its own failure. So nothing
here may raise: what goes wrong is logged, and transformers stays as it is.
"""

from __future__ import annotations

import logging
from types import ModuleType

log = logging.getLogger(__name__)


def activate() -> None:
    """Import ``wooly_hf`` as soon as transformers can load models. Imports neither of them itself."""
    try:
        from shared_store.runtime.import_hooks import when_imported

        when_imported("transformers.modeling_utils", _import_wooly)
    except Exception as error:  # noqa: BLE001 - whatever it is, torch must import
        _tell(error)


def _import_wooly(_: ModuleType) -> None:
    try:
        import wooly_hf  # noqa: F401 - importing it is what activates it
    except Exception as error:  # noqa: BLE001 - whatever it is, transformers must import
        _tell(error)


def _tell(error: Exception) -> None:
    log.warning("wooly: weights are not shared in this process: %s: %s", type(error).__name__, error)
