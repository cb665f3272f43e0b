"""``python -m shared_store.cli``: the ``wooly`` command."""

import sys

from shared_store.cli import main

if __name__ == "__main__":
    sys.exit(main())
