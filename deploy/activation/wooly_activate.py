"""Register wooly with transformers without ``import wooly_hf``, in every process that imports torch.

torch calls :func:`activate` at the end of its own import, and an exception would make that import fail. So nothing here
raises: errors are logged, and transformers loads weights as usual.
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
    except Exception as error:  # noqa: BLE001 - the import of torch must succeed
        _log(error)


def _import_wooly(_: ModuleType) -> None:
    try:
        import wooly_hf  # noqa: F401 - the import registers wooly
    except Exception as error:  # noqa: BLE001 - the import of transformers must succeed
        _log(error)


def _log(error: Exception) -> None:
    log.warning("wooly: weights are not shared in this process: %s: %s", type(error).__name__, error)
