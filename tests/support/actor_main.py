"""The process behind `actors.Actor`: a `client.Client` whose methods are called by lines of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.client import Client


def main():
    client = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            if method == "connect":
                client = Client(**arguments)
                result = None
            else:
                result = getattr(client, method)(**arguments)
            answer = {"result": result}
        except Exception as error:  # noqa: BLE001 - any error is sent to the calling test
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
