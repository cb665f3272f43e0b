"""A vLLM engine on a CPU, in one process, for the benchmark ``cpu``."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, play

SEQUENCES, TOKENS = 4, 64
RUNS = 4
"""Decode runs; the first is a warm-up."""


def engine(talk: Talk, job: dict[str, Any]) -> None:
    """Load and decode, send ``result``; then send ``memory`` for each word. ``job``: ``model``, ``load_format``."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    wooly = job["load_format"] == "wooly"
    loader: Any = base_loader.BaseModelLoader
    if wooly:
        from wooly_vllm.loading.loader import WoolyLoader as loader  # noqa: N813 - the class that is timed
    seconds = _time_loads(loader)
    before = memory()
    llm = LLM(
        job["model"],
        load_format=job["load_format"],
        model_loader_extra_config={"fallback": False} if wooly else {},
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=SEQUENCES,
        enforce_eager=True,
        dtype="bfloat16",
        seed=0,
        disable_log_stats=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [7 + i, *range(10, 40)]} for i in range(SEQUENCES)]
    rates, tokens = [], []
    for _ in range(RUNS):
        began = time.perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        rates.append(SEQUENCES * TOKENS / (time.perf_counter() - began))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
    talk.send("result", load_s=seconds[-1], tokens_per_s=statistics.median(rates[1:]), tokens=tokens, before=before)
    for word in talk.words():
        talk.send(word, **memory())


def _time_loads(loader: Any) -> list[float]:
    """Wrap ``load_model`` of a loader class; return the list to which each call appends its duration in seconds."""
    seconds: list[float] = []
    stock = loader.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    loader.load_model = load_model
    return seconds


def memory() -> dict[str, int]:
    """Return the proportional set size (bytes) of this process: allocated memory, and its share of memory files."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"private": values["Pss_Anon"], "shared": values["Pss_Shmem"]}


def main() -> None:
    """Run the role given on the command line."""
    play({"engine": engine})
