"""A vLLM engine on a GPU, in one process, for the benchmark ``gpu``."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.worker import Talk, now, play
from benchmarks.workers.watch import Stopwatch, watch_stock, watch_wooly

SHAPES = {"decode": (64, 128), "prefill": (512, 1)}
"""Prompt tokens and generated tokens of each measurement."""


def engine(talk: Talk, job: dict[str, Any]) -> None:
    """Load, generate one token, then decode or prefill for each word received.

    ``job``: ``model``, ``load_format``, ``settings`` (arguments of the engine), ``gate`` (wait for the word ``start``
    after imports), ``batch`` (requests of a measurement), ``warm`` (run one batch before ``ready``).
    """
    from vllm import LLM

    watch = Stopwatch()
    loaded: dict[str, Any] = {}
    wooly = job["load_format"] == "wooly"
    (watch_wooly if wooly else watch_stock)(watch, loaded)
    talk.send("imported")
    words = talk.words()
    if job["gate"] and next(words, "") != "start":
        return
    llm = LLM(
        job["model"],
        load_format=job["load_format"],
        model_loader_extra_config={"fallback": False} if wooly else {},
        **job["settings"],
    )
    _generate(llm, requests=1, prompt=32, tokens=1)
    first_token = now()
    if job["warm"]:
        _generate(llm, requests=job["batch"], prompt=64, tokens=128)
    talk.send("ready", first_token=first_token, spans=watch.spans, **loaded)
    for word in words:
        talk.send(word, **_measure(llm, word, job["batch"]))


def _measure(llm: Any, word: str, batch: int) -> dict[str, Any]:
    if word not in SHAPES:
        raise ValueError(f"expected one of {', '.join(SHAPES)} on stdin, got {word!r}")
    prompt, tokens = SHAPES[word]
    began = now()
    answers = _generate(llm, requests=batch, prompt=prompt, tokens=tokens)
    return {
        "began": began,
        "ended": now(),
        "count": batch * (tokens if word == "decode" else prompt),
        "tokens": answers,
    }


def _generate(llm: Any, *, requests: int, prompt: int, tokens: int) -> list[list[int]]:
    """Return greedy tokens for prompts of ``prompt`` tokens, which differ from their first token on."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [10 + (37 * i + 101 * j) % 500 for j in range(prompt)]} for i in range(requests)]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """Run the role given on the command line."""
    play({"engine": engine})
