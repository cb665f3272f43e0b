"""The processes that the parity matrix compares: ``python parity_engine.py``, started by ``parity.py``.

A process says ``imported``, and then does one job after the other: a JSON object on stdin names a model, how to load it
and the engine's settings; the process answers greedily, keeps the engine, and on ``free`` answers once more and lets it
go. An error is told as ``failed``, and ends the process: its memory may be anything by then.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from gpu_engine import Talk

PROMPTS = ([*range(10, 42)], [5, 9, 100, 7], [300, 2, 17, 17, 17, 4, 8])
TOKENS = 24
_NOT_SHARED = re.compile(r"loaded the stock way, and not shared: (?P<reason>.*?) \[(?P<code>\w+)\]\. ", re.DOTALL)


class Refusals(logging.Filter):
    """Hears why a model is not shared: the reason is what wooly logs when it falls back.

    A filter that lets everything through, for vLLM takes handlers away when it sets its logging up again.
    """

    def __init__(self) -> None:
        """Listen to wooly's logger."""
        super().__init__()
        self.reasons: list[str] = []
        logging.getLogger("vllm.wooly").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the reason, if that is what it says."""
        if found := _NOT_SHARED.search(record.getMessage()):
            self.reasons.append(f"{found['reason']} [{found['code']}]")
        return True

    def stop(self) -> None:
        """Listen no more."""
        logging.getLogger("vllm.wooly").removeFilter(self)


def ask(llm: Any, *, embeds: bool) -> list[list[float]]:
    """Greedy tokens, or the embeddings, of each prompt; two answers are equal if all of their bits are."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    if embeds:
        return [list(map(float, output.outputs.embedding)) for output in llm.embed(prompts, use_tqdm=False)]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]


def shared() -> dict[str, Any]:
    """What the store says of this process's lease: its role, and bytes that it maps and has for itself."""
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
    """Of the packages that decide, as this process has them."""
    import torch
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def last_line(error: Exception) -> str:
    """The end of an error's text, without what the validation of vLLM's configuration puts after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    helpful = [line for line in lines if not line.startswith("For further information visit")]
    return f"{type(error).__name__}: {(helpful or [''])[-1].partition(' [type=')[0]}"


def do(job: dict[str, Any], say: Callable[..., None], words: Any) -> bool:
    """One job; returns whether the process may have another."""
    import torch
    from vllm import LLM

    refusals = Refusals()
    try:
        llm = LLM(
            job["model"], load_format=job["load_format"], model_loader_extra_config=job["extra"], **job["settings"]
        )
        answer = ask(llm, embeds=job["embeds"])
        say("answered", answer=answer, refused=refusals.reasons, **(shared() if job["load_format"] == "wooly" else {}))
        next(words)  # "free"
        again = ask(llm, embeds=job["embeds"])
    except Exception as error:
        logging.getLogger("vllm.parity").exception("this row fails")
        not_shared = f" (not shared: {refusals.reasons[0]})" if refusals.reasons else ""
        say("failed", error=last_line(error) + not_shared)
        return False
    finally:
        refusals.stop()
    shut_down = getattr(llm.llm_engine.engine_core, "shutdown", None)
    if shut_down is not None:
        shut_down()
    del llm, shut_down
    gc.collect()
    torch.compiler.reset()  # of one function only so many compiled variants may be alive in a process
    left = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved()
    say("freed", answer=again, left_bytes=left)
    return True


def main() -> None:
    """Do jobs until the end of input."""
    talk = Talk()
    import vllm.entrypoints.llm  # noqa: F401 - what takes long is done before the first job

    talk.say("imported", versions=versions())
    words = talk.words()
    for word in words:
        if not do(json.loads(word), talk.say, words):
            sys.exit(1)


if __name__ == "__main__":
    main()
