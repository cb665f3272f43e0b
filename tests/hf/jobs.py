"""Processes with transformers and wooly in them, that a test gives Python to run piece by piece."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

from support.preloaded import Pool
from support.waiting import readable

TESTS = Path(__file__).resolve().parent.parent

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    # Sums of floats depend on how they are divided among threads.
    "OMP_NUM_THREADS": "1",
}
PRELOADED = Pool(
    (
        "hf.describe",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
    ),
    _SETTINGS,
)
"""Neither wooly nor PEFT, for what happens when they are imported is tested."""

_BEGINNING = """
import gc, torch, transformers, wooly_hf
from hf.describe import *

def load(path, device_map="wooly:cpu", cls=transformers.AutoModelForCausalLM, **options):
    if isinstance(options.get("dtype"), str):
        options["dtype"] = getattr(torch, options["dtype"])
    return cls.from_pretrained(path, **({"device_map": device_map} if device_map else {}), **options)
def facts(model):
    found = wooly_hf.stats(model)
    return [found.shared_bytes, found.private_bytes, found.written_bytes]
"""

_FORGET = """
for _name in [name for name, it in globals().items() if isinstance(it, torch.nn.Module) or name.startswith("my_")]:
    del globals()[_name]
gc.collect()
"""


class Job:
    """A process with `load(path, device_map)` and `facts(model)` in it. Names stay from one run to the next."""

    def __init__(self, directory, log, **environment):
        stock = {name: text for name, text in os.environ.items() if not name.startswith("WOOLY")}
        self._log = Path(log)
        with self._log.open("ab") as stderr:
            self._process = PRELOADED.start(
                str(Path(__file__).with_name("job_main.py")),
                environment={
                    **stock,
                    **_SETTINGS,
                    "WOOLY_RUNTIME_DIR": str(directory),
                    "WOOLY_AUTOSTART": "0",
                    **environment,
                },
                stderr=stderr,
                text=False,
            )
        self._unread = b""
        self.run(_BEGINNING)

    @property
    def pid(self):
        return self._process.pid

    def log(self):
        """What it wrote to stderr, its logging included."""
        return self._log.read_text(errors="replace")

    def begin(self, code, **names):
        """Run a piece of code, with some names set to JSON values; `result` is what it gives back."""
        request = json.dumps([textwrap.dedent(code), {name: _plain(value) for name, value in names.items()}])
        self._process.stdin.write(request.encode() + b"\n")

    def answered(self):
        """Whether what was begun has ended."""
        return readable(self._process.stdout, 0)

    def finish(self, timeout_s=300.0):
        """The `result` of what was begun; an exception there is a `JobError` here."""
        while b"\n" not in self._unread:
            if not readable(self._process.stdout, timeout_s):
                raise AssertionError(f"the job did not answer within {timeout_s} s: {self.log()}")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise AssertionError(f"the job ended: {self.log()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise JobError(answer["error"], answer["text"], answer["trace"])
        return answer["result"]

    def run(self, code, **names):
        self.begin(code, **names)
        return self.finish()

    def forget(self):
        """Let go of all models, and of names that begin with `my_`."""
        self.run(_FORGET)

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class JobError(Exception):
    """What a job raised: the class's name, the message, and where."""

    def __init__(self, name, text, trace):
        super().__init__(f"{name}: {text}\n{trace}")
        self.name = name
        self.text = text


def _plain(value):
    return str(value) if isinstance(value, Path) else value
