"""Save the checkpoint of every architecture, each in a directory of its name below the directory that is given."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.architectures import ARCHITECTURES


def main() -> None:
    for each in ARCHITECTURES:
        each.save(Path(sys.argv[1]) / each.name)


main()
