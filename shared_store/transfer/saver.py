"""The name under which engines of earlier versions start the saver: ``python -m shared_store.transfer.saver``."""

from __future__ import annotations

import sys

from shared_store.disk.saver import main

if __name__ == "__main__":
    sys.exit(main())
