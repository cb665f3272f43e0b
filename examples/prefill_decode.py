#!/usr/bin/env python3
"""Prefill and decode in two engines, on one GPU (or CPU) and one copy of the weights.

    python examples/prefill_decode.py MODEL [--check] [--engine-args JSON] [--json]

One vLLM engine computes the KV cache of the prompts, another one takes it over and writes the answers. They hand it
over with vLLM's own ``ExampleConnector``, through files in memory: it needs nothing but vLLM, and shows the shape of
the thing. In production the same two engines use NIXL or LMCache; nothing about the weights changes with that.

Both engines load with ``--load-format wooly``: whichever comes first publishes the weights, the other one maps them.
``--check`` starts a third engine, with no hand-over, and compares the answers.

Exit codes: 0 answered (and, with --check, alike), 1 not alike, 2 an engine failed.
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
"""Of the made-up prompts. The connector hands over whole blocks only, so a prompt must be longer than one."""


class EngineError(Exception):
    """An engine ended before it answered; the message ends with the end of its log."""


class Engine:
    """One of the engines: a process that is told prompts and says answers, one JSON object a line."""

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

    def hear(self) -> Any:
        """Its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(f"the {self._role} engine ended with exit code {self._process.wait()}:\n{end}")
        return json.loads(line)

    def answer(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers to prompts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answers: list[list[int]] = self.hear()["answers"]
        return answers

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=120)


def play(role: str, job: dict[str, Any]) -> None:
    """Be an engine until the end of input."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    from vllm import LLM, SamplingParams

    settings = dict(job["engine_args"])
    if (kv_role := ROLES[role]) is not None:
        settings["kv_transfer_config"] = {
            "kv_connector": "ExampleConnector",
            "kv_role": kv_role,
            "kv_connector_extra_config": {"shared_storage_path": job["handed_over_in"]},
        }
    llm = LLM(job["model"], load_format=job["load_format"], **settings)
    out.write(json.dumps({"ready": role}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], detokenize=False, ignore_eos=True)
        outputs = [llm.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)[0] for ids in asked["prompts"]]
        out.write(json.dumps({"answers": [list(output.outputs[0].token_ids) for output in outputs]}) + "\n")


def main() -> int:
    """Start the engines, hand the prompts from one to the other, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a name, as for `vllm serve`")
    parser.add_argument("--prompt", action="append", default=[], help="text; may be given more than once")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer (default: 24)")
    parser.add_argument("--load-format", default="wooly", help="auto, to see it without wooly (default: wooly)")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="keyword arguments of vLLM's LLM"
    )
    parser.add_argument("--check", action="store_true", help="compare with an engine that does both")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    given = parser.parse_args()
    prompts = _encoded(given.model, given.prompt)
    # Files in memory: a KV cache on a disk would be slow, and is not worth keeping.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        job = {
            "model": given.model,
            "load_format": given.load_format,
            "engine_args": {"skip_tokenizer_init": not given.prompt, **given.engine_args},
            "handed_over_in": directory,
        }
        logs = Path(directory)
        engines: dict[str, Engine] = {}
        try:
            for role in ("prefill", "decode", *(["alone"] if given.check else [])):
                engines[role] = Engine(role, job, logs / f"{role}.log")
            for engine in engines.values():
                engine.hear()
            engines["prefill"].answer(prompts, tokens=1)
            answers = engines["decode"].answer(prompts, given.tokens)
            alone = engines["alone"].answer(prompts, given.tokens) if given.check else None
            shared = _shared() if given.load_format == "wooly" else {}
            handed_over = sum(1 for _ in Path(directory).rglob("*.safetensors"))
            took_over = "External Cache Hit" in (logs / "decode.log").read_text(errors="replace")
        except EngineError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            for engine in engines.values():
                engine.end()
    result = {
        "answers": answers,
        "kv_files": handed_over,
        "kv_taken_over": took_over,
        "alike": None if alone is None else answers == alone,
        "weights": shared,
    }
    print(json.dumps(result) if given.json else _told(result))
    return int(result["alike"] is False)


def _encoded(model: str, texts: list[str]) -> list[list[int]]:
    """The prompts' tokens; made-up ones where no text is given, so that a model without a tokenizer will do."""
    if not texts:
        return [[10 + (37 * i + 101 * j) % 500 for j in range(PROMPT_TOKENS + i)] for i in range(3)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text)["input_ids"] for text in texts]


def _shared() -> dict[str, Any]:
    """What the store says of the weights: how many bytes there are once, and how many engines read them."""
    from shared_store.client.session import Session

    with Session.connect(autostart=False) as session:
        models = [model for model in session.status().models if model.readers]
    return {model.name: {"bytes": model.bytes, "readers": model.readers} for model in models}


def _told(result: dict[str, Any]) -> str:
    lines = [f"{number}: {answer}" for number, answer in enumerate(result["answers"])]
    lines += [f"KV cache handed over in {result['kv_files']} files; taken over: {result['kv_taken_over']}"]
    for name, weights in result["weights"].items():
        lines += [f"{name}: {weights['bytes'] / 2**20:.1f} MiB of weights once, {weights['readers']} engines read them"]
    if result["alike"] is not None:
        lines += [f"as an engine that does both: {'yes' if result['alike'] else 'NO'}"]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        play(sys.argv[2], json.loads(sys.argv[3]))
        sys.exit(0)
    sys.exit(main())
