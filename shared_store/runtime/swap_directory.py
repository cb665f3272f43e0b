"""The swap directory: where copies lie that are not in host memory.

Relies on the user for a directory on a disk with enough space. Does not promise that it is encrypted: weights and KV
caches lie there in plain text, in files without a name and with mode 0600.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from shared_store.base.errors import ConfigError
from shared_store.base.file_systems import in_memory

DEFAULT: Final = Path("/var/tmp")  # noqa: S108 - files have no names


def swap_directory(configured: Path | None = None) -> Path:
    """Return the directory for swapped bytes.

    Args:
        configured: the user's choice, which may be on tmpfs; None: :data:`DEFAULT`, unless that is in memory.

    Raises:
        ConfigError: the directory does not exist or cannot be written to, or the default is in memory.
    """
    directory = configured or DEFAULT
    try:
        if configured is None and in_memory(directory):
            raise ConfigError(f"{directory} is in memory, so nothing is swapped there; set WOOLY_SWAP_DIR to a disk")
        if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(
                f"the swap directory {directory} does not exist, or cannot be written to; set WOOLY_SWAP_DIR to "
                "another one"
            )
    except OSError as error:
        raise ConfigError(f"the swap directory {directory} cannot be used: {error.strerror}") from error
    return directory
