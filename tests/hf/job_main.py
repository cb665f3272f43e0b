"""The process behind `jobs.Job`: runs the code that comes in lines of JSON, in one namespace."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback


def main():
    # Only answers go where answers are read.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    names = {}
    for line in sys.stdin:
        code, given = json.loads(line)
        names.pop("result", None)
        names.update(given)
        try:
            exec(compile(code, "<test>", "exec"), names)  # the test's own
            answer = {"result": names.get("result")}
        except Exception as error:  # noqa: BLE001 - the test that called is told of any
            answer = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
