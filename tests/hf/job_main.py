"""The program of `jobs.Job`: run code from lines of JSON, in one namespace."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback


def main():
    # Keep stdout for answers: everything that libraries print goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    names = {}
    for line in sys.stdin:
        code, given = json.loads(line)
        names.pop("result", None)
        names.update(given)
        try:
            exec(compile(code, "<test>", "exec"), names)  # code of the test
            answer = {"result": names.get("result")}
        except Exception as error:  # noqa: BLE001 - reported to the test
            answer = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
