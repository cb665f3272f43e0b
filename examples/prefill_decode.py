#!/usr/bin/env python3
"""Disaggregated prefill and decode on one GPU (or CPU) with one copy of the weights.

    python examples/prefill_decode.py MODEL [--check] [--engine-args JSON] [--json]

One vLLM engine computes the KV cache of the prompts, and a second one loads it and generates the answers. They transfer
it with vLLM's own ``ExampleConnector``, through files in memory, because that needs nothing but vLLM. In production the
same two engines use NIXL or LMCache; that makes no difference to the weights.

Both engines load with ``--load-format wooly``: the first one publishes the weights, the second one maps them.
``--check`` starts a third engine, which does both steps, and compares the answers.

Exit codes: 0 answered (with --check: and the answers are equal), 1 the answers differ, 2 an engine failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "alone": None}
PROMPT_TOKENS = 200
"""Length of the made-up prompts. The connector transfers full blocks only, so a prompt must be longer than a block."""


class EngineError(Exception):
    """An engine ended before it answered. The message contains the end of its log."""


class Engine:
    """A process with one engine. Reads prompts and writes answers, one JSON object per line."""

    def __init__(self, role: str, job: dict[str, Any], log: Path) -> None:
        self._role, self._log = role, log
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--role", role, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )

    def read(self) -> Any:
        """Read the next object. Raises :class:`EngineError` if the process ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(f"the {self._role} engine ended with exit code {self._process.wait()}:\n{end}")
        return json.loads(line)

    def answer(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Return greedy answers of ``tokens`` tokens to prompts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answers: list[list[int]] = self.read()["answers"]
        return answers

    def end(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=120)


def run_engine(role: str, job: dict[str, Any]) -> None:
    """Run an engine in this process until the end of standard input."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to the log
    from vllm import LLM, SamplingParams

    settings = dict(job["engine_args"])
    if (kv_role := ROLES[role]) is not None:
        settings["kv_transfer_config"] = {
            "kv_connector": "ExampleConnector",
            "kv_role": kv_role,
            "kv_connector_extra_config": {"shared_storage_path": job["kv_directory"]},
        }
    llm = LLM(job["model"], load_format=job["load_format"], **settings)
    out.write(json.dumps({"ready": role}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], detokenize=False, ignore_eos=True)
        outputs = [llm.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)[0] for ids in request["prompts"]]
        out.write(json.dumps({"answers": [list(output.outputs[0].token_ids) for output in outputs]}) + "\n")


def main() -> int:
    """Start the engines, prefill with one and decode with the other, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or name, as for `vllm serve`")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text of a prompt; repeatable (default: made-up tokens)"
    )
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer (default: 24)")
    parser.add_argument(
        "--load-format", default="wooly", help="vLLM's load format; auto runs without wooly (default: wooly)"
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="keyword arguments of vLLM's LLM"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the answers of one engine that does both steps"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    given = parser.parse_args()
    prompts = _encoded(given.model, given.prompt)
    # A KV cache on a disk would be slow.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        job = {
            "model": given.model,
            "load_format": given.load_format,
            "engine_args": {"skip_tokenizer_init": not given.prompt, **given.engine_args},
            "kv_directory": directory,
        }
        logs = Path(directory)
        engines: dict[str, Engine] = {}
        try:
            for role in ("prefill", "decode", *(["alone"] if given.check else [])):
                engines[role] = Engine(role, job, logs / f"{role}.log")
            for engine in engines.values():
                engine.read()
            engines["prefill"].answer(prompts, tokens=1)
            answers = engines["decode"].answer(prompts, given.tokens)
            alone = engines["alone"].answer(prompts, given.tokens) if given.check else None
            shared = _shared() if given.load_format == "wooly" else {}
            kv_files = sum(1 for _ in Path(directory).rglob("*.safetensors"))
            cache_hit = "External Cache Hit" in (logs / "decode.log").read_text(errors="replace")
        except EngineError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            for engine in engines.values():
                engine.end()
    result = {
        "answers": answers,
        "kv_files": kv_files,
        "kv_taken_over": cache_hit,
        "alike": None if alone is None else answers == alone,
        "weights": shared,
    }
    print(json.dumps(result) if given.json else _as_text(result))
    return int(result["alike"] is False)


def _encoded(model: str, texts: list[str]) -> list[list[int]]:
    """Return the tokens of the prompts; made-up ones without texts, so that the model needs no tokenizer."""
    if not texts:
        return [[10 + (37 * i + 101 * j) % 500 for j in range(PROMPT_TOKENS + i)] for i in range(3)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text)["input_ids"] for text in texts]


def _shared() -> dict[str, Any]:
    """Return the shared bytes and the number of readers of each model in use, from the store's status."""
    from shared_store.client.session import Session

    with Session.connect(autostart=False) as session:
        models = [model for model in session.status().models if model.readers]
    return {model.name: {"bytes": model.bytes, "readers": model.readers} for model in models}


def _as_text(result: dict[str, Any]) -> str:
    lines = [f"{number}: {answer}" for number, answer in enumerate(result["answers"])]
    lines += [f"KV cache transferred in {result['kv_files']} files; loaded by the decoder: {result['kv_taken_over']}"]
    for name, weights in result["weights"].items():
        lines += [f"{name}: {weights['bytes'] / 2**20:.1f} MiB of shared weights, {weights['readers']} readers"]
    if result["alike"] is not None:
        lines += [f"equal to one engine that does both steps: {'yes' if result['alike'] else 'NO'}"]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        run_engine(sys.argv[2], json.loads(sys.argv[3]))
        sys.exit(0)
    sys.exit(main())
