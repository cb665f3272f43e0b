"""The engine processes that the parity matrix compares."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.harness.worker import Talk, play

PROMPTS = ([*range(10, 42)], [5, 9, 100, 7], [300, 2, 17, 17, 17, 4, 8])
TOKENS = 24
_NOT_SHARED = re.compile(r"loaded the stock way, and not shared: (?P<reason>.*?) \[(?P<code>\w+)\]\. ", re.DOTALL)


class Refusals(logging.Filter):
    """Collect the reasons that wooly logs when it does not share a model.

    A filter that passes all records: vLLM removes handlers when it configures logging again, but not filters.
    """

    def __init__(self) -> None:
        """Attach to wooly's logger."""
        super().__init__()
        self.reasons: list[str] = []
        logging.getLogger("vllm.wooly").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Record the reason, if the message has one."""
        if found := _NOT_SHARED.search(record.getMessage()):
            self.reasons.append(f"{found['reason']} [{found['code']}]")
        return True

    def stop(self) -> None:
        """Detach from wooly's logger."""
        logging.getLogger("vllm.wooly").removeFilter(self)


def ask(llm: Any, *, embeds: bool) -> list[list[float]]:
    """Return greedy tokens, or the embedding, of each prompt. Equal answers have equal bits."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    if embeds:
        return [list(map(float, output.outputs.embedding)) for output in llm.embed(prompts, use_tqdm=False)]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]


def shared() -> dict[str, Any]:
    """Return the status of this process's lease: role, mapped bytes, private bytes."""
    from shared_store.base.errors import WoolyError
    from shared_store.client.session import Session

    try:
        with Session.connect(autostart=False) as session:
            leases = [client for client in session.status().clients if client.pid == os.getpid() and client.key]
    except WoolyError as error:
        return {"role": None, "store": str(error)}
    if not leases:
        return {"role": None}
    return {
        "role": leases[-1].role,
        "mapped_bytes": leases[-1].mapped_bytes,
        "private_bytes": leases[-1].private_bytes,
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a result."""
    import torch
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def last_line(error: Exception) -> str:
    """Return the last line of an error, without the help that vLLM's configuration validation appends."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    helpful = [line for line in lines if not line.startswith("For further information visit")]
    return f"{type(error).__name__}: {(helpful or [''])[-1].partition(' [type=')[0]}"


def compare(talk: Talk, job: dict[str, Any]) -> None:  # noqa: ARG001 - the signature of all roles
    """Send ``imported``, then run one row after the other. Each word is a row's job as JSON.

    A row: load the model, send ``answered``; on ``free``, answer again, shut the engine down, send ``freed``. After an
    error, send ``failed`` and exit, because the state of the process is unknown.
    """
    import vllm.entrypoints.llm  # noqa: F401 - imports take longest, and happen before the first row

    talk.send("imported", versions=versions())
    words = talk.words()
    for word in words:
        if not _run_row(json.loads(word), talk, words):
            return


def _run_row(job: dict[str, Any], talk: Talk, words: Iterator[str]) -> bool:
    """Run a row; return False if it failed.

    ``job``: ``model``, ``load_format``, ``extra``, ``settings``, ``embeds``; see ``Engines``.
    """
    import torch
    from vllm import LLM

    refusals = Refusals()
    try:
        llm = LLM(
            job["model"], load_format=job["load_format"], model_loader_extra_config=job["extra"], **job["settings"]
        )
        answer = ask(llm, embeds=job["embeds"])
        lease = shared() if job["load_format"] == "wooly" else {}
        talk.send("answered", answer=answer, refused=refusals.reasons, **lease)
        next(words)  # "free"
        again = ask(llm, embeds=job["embeds"])
    except Exception as error:
        logging.getLogger("vllm.parity").exception("the row failed")
        not_shared = f" (not shared: {refusals.reasons[0]})" if refusals.reasons else ""
        talk.send("failed", error=last_line(error) + not_shared)
        return False
    finally:
        refusals.stop()
    shut_down = getattr(llm.llm_engine.engine_core, "shutdown", None)
    if shut_down is not None:
        shut_down()
    del llm, shut_down
    gc.collect()
    torch.compiler.reset()  # torch limits the compiled variants of a function in a process
    left = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved()
    talk.send("freed", answer=again, left_bytes=left)
    return True


def main() -> None:
    """Run the role given on the command line."""
    play(dict.fromkeys(("stock", "publisher", "reader"), compare))
