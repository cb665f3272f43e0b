"""An engine process for tests: ``python engine.py JSON``. Prints one JSON object a line; see :func:`main`.

The process is a real vLLM engine, in one process. Tests read its lines as events, and can hold it between steps.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

PROMPTS = ([*range(10, 42)], [5, 9, 100, 7], [300, 2, 17, 17, 17, 4, 8])
TOKENS = 24
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "seed": 0,
    "disable_log_stats": True,
}


def say(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def wait_for(word: str) -> None:
    """Block until the test sends a line with this word."""
    line = sys.stdin.readline().strip()
    if line != word:
        raise SystemExit(f"expected {word!r} on stdin, got {line!r}")


def tokens_of(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def scribble(llm: Any) -> int:
    """Write to every parameter in place; returns how many."""
    import torch

    parameters = list(model_of(llm).parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.data.add_(1)
    return len(parameters)


def run_model(engine: Any, model: str, job: dict[str, Any]) -> None:
    say("starting", model=model)
    read_before = bytes_read()
    try:
        llm = engine(
            model,
            load_format=job.get("load_format", "auto"),
            model_loader_extra_config=job.get("extra", {}),
            **(SETTINGS | job.get("settings", {})),
        )
    except Exception as error:
        say("failed", model=model, error=f"{type(error).__name__}: {error}")
        raise
    facts: dict[str, Any] = {
        "model": model,
        "bytes_read": bytes_read() - read_before,
        "kv_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "tokens": tokens_of(llm),
    }
    if job.get("lease", job.get("load_format") == "wooly"):
        facts |= lease_of_this_process()
    if job.get("scribble"):
        facts["scribbled"] = scribble(llm)
        facts["tokens_after"] = tokens_of(llm)
    say("answered", **facts)
    if job.get("hold"):
        wait_for("go on")
        say("answered again", model=model, tokens=tokens_of(llm))
    del llm
    gc.collect()


def bytes_read() -> int:
    """Bytes that this process has got from read(2) and its kin, as the kernel counts them (``proc_pid_io(5)``)."""
    with open("/proc/self/io", encoding="ascii") as lines:  # noqa: PTH123 - one line of it is wanted
        return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def lease_of_this_process() -> dict[str, Any]:
    """What the store says of this process's last lease."""
    from shared_store.client.session import Session

    with Session.connect(autostart=False) as session:
        leases = [client for client in session.status().clients if client.pid == os.getpid() and client.key]
    last = leases[-1] if leases else None
    return {
        "role": last.role if last else None,
        "mapped_bytes": last.mapped_bytes if last else 0,
        "private_bytes": last.private_bytes if last else 0,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM

    say("imported", pid=os.getpid())
    if job.get("gate"):
        wait_for("start")
    for model in job["models"]:
        run_model(LLM, model, job)
    say("done")


if __name__ == "__main__":
    main()
