"""Alias of :mod:`shared_store.disk.saver`, by the name that engines of earlier versions start it with (``-m``)."""

from __future__ import annotations

import sys

from shared_store.disk.saver import main

if __name__ == "__main__":
    sys.exit(main())
