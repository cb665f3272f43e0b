"""vLLM on a CPU, side by side in one run: memory, time to load or attach, and decode speed; stock and wooly.

Four roles, a fresh engine process each: ``stock`` (as shipped), ``stock_dispatch`` (stock under the linear kernels that
wooly uses, so that a difference in speed can be told apart from sharing), ``publisher`` and ``reader``. Publisher and
reader live at the same time, as servers do, and each says what memory it answers for. The roles take turns ``--rounds``
times; figures are medians, and every single value is kept beside them.

    python benchmarks/bench_cpu.py [--model DIR] [--rounds N] [--out benchmarks/results/cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import checkpoints

HERE = Path(__file__).resolve().parent
ROLES = ("stock", "stock_dispatch", "publisher", "reader")
DECODE_SEQUENCES, DECODE_TOKENS = 4, 64


def engine(job: dict[str, Any]) -> None:
    """One engine process: load, measure, print one JSON line, and (``hold``) live on until stdin closes."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    loader: Any = base_loader.BaseModelLoader
    if job["load_format"] == "wooly":
        from wooly_vllm.loading.loader import WoolyLoader as loader  # noqa: N813 - the class that is timed
    seconds: list[float] = []
    timed = loader.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return timed(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    loader.load_model = load_model
    before = memory()
    llm = LLM(
        job["model"],
        load_format=job["load_format"],
        model_loader_extra_config={"fallback": False} if job["load_format"] == "wooly" else {},
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=DECODE_SEQUENCES,
        enforce_eager=True,
        dtype="bfloat16",
        seed=0,
        disable_log_stats=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=DECODE_TOKENS, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [7 + i, *range(10, 40)]} for i in range(DECODE_SEQUENCES)]
    rates, tokens = [], []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        rates.append(DECODE_SEQUENCES * DECODE_TOKENS / (time.perf_counter() - began))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
    facts = {"load_s": seconds[-1], "tokens_per_s": statistics.median(rates[1:]), "tokens": tokens, "before": before}
    print(json.dumps({"result": facts}), flush=True)
    for _ in sys.stdin:  # "measure", as often as wanted; the end of input is the end
        print(json.dumps({"memory": memory()}), flush=True)


def memory() -> dict[str, int]:
    """Proportional set size of this process, in bytes: what it allocated, and its share of mapped memory files."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"private": values["Pss_Anon"], "shared": values["Pss_Shmem"]}


class Engine:
    """A running engine process."""

    def __init__(self, role: str, model: Path, runtime_dir: str) -> None:
        job = {"model": str(model), "load_format": "wooly" if role in ("publisher", "reader") else "auto"}
        environment = {
            **os.environ,
            "WOOLY_RUNTIME_DIR": runtime_dir,
            "WOOLY_CPU_DISPATCH": "1" if role == "stock_dispatch" else "0",
        }
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.result = self._line("result")

    def memory(self) -> int:
        """Bytes that it answers for now."""
        assert self.process.stdin
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        now = self._line("memory")
        return int(now["private"] + now["shared"])

    def end(self) -> None:
        """Let it go, and wait until it is gone."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _line(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(f'{{"{kind}"'):
                found: dict[str, Any] = json.loads(line)[kind]
                return found
        raise SystemExit(f"the {self.role} engine ended without a result (exit code {self.process.wait()})")


def one_round(model: Path) -> dict[str, dict[str, Any]]:
    """Every role once, on a store that was empty before."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp") as runtime_dir:
        for group in (("stock",), ("stock_dispatch",), ("publisher", "reader")):
            engines = [Engine(role, model, runtime_dir) for role in group]
            for each in engines:
                found[each.role] = {**each.result, "memory_bytes": each.memory()}
            if "publisher" in group:
                found["store"] = store_totals(runtime_dir)
            for each in engines:
                each.end()
        stop_store(runtime_dir)
    return found


def store_totals(runtime_dir: str) -> dict[str, int]:
    """Resident, mapped and saved bytes."""
    from shared_store.client.session import Session

    with Session.connect(Path(runtime_dir), autostart=False) as session:
        totals = session.status().totals
    return {
        "resident_bytes": totals.resident_bytes,
        "mapped_bytes": totals.mapped_bytes,
        "saved_bytes": totals.saved_bytes,
    }


def stop_store(runtime_dir: str) -> None:
    """End the store that the engines started."""
    from shared_store.client.session import Session

    with Session.connect(Path(runtime_dir), autostart=False) as session:
        keeper = session.status().keeper
        session.shutdown_store()
    while keeper is not None and Path(f"/proc/{keeper.pid}").exists():
        time.sleep(0.05)


def versions() -> dict[str, str]:
    """What was measured, and where."""
    from importlib import metadata

    model = next(
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": model.split(":")[1].strip(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("wooly", "vllm-cpu", "torch", "transformers")},
    }


def main() -> None:
    """Run the roles and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="checkpoint directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    arguments = parser.parse_args()
    if arguments.engine:
        engine(json.loads(arguments.engine))
        return
    model = arguments.model or checkpoints.smollm2(checkpoints.CACHE)
    rounds = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds} ...", flush=True)
        rounds.append(one_round(model))
    result: dict[str, Any] = {"versions": versions(), "model": model.name, "rounds": arguments.rounds}
    for role in ROLES:
        result[role] = {
            name: {
                "median": statistics.median(each[role][name] for each in rounds),
                "all": [e[role][name] for e in rounds],
            }
            for name in ("load_s", "tokens_per_s", "memory_bytes")
        }
    result["store"] = rounds[-1]["store"]
    reference = [each["stock_dispatch"]["tokens"] for each in rounds]
    result["tokens_equal_same_dispatch"] = all(
        each[role]["tokens"] == wanted for each, wanted in zip(rounds, reference, strict=True) for role in ROLES[2:]
    )
    result["tokens_equal_as_shipped"] = all(
        each[role]["tokens"] == each["stock"]["tokens"] for each in rounds for role in ROLES[2:]
    )
    result["ratios"] = {
        "decode_reader_to_stock": _ratio(rounds, "reader", "stock", "tokens_per_s"),
        "decode_reader_to_stock_dispatch": _ratio(rounds, "reader", "stock_dispatch", "tokens_per_s"),
        "attach_to_stock_load": _ratio(rounds, "reader", "stock", "load_s"),
        "memory_reader_to_stock": _ratio(rounds, "reader", "stock", "memory_bytes"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"]))


def _ratio(rounds: list[dict[str, dict[str, Any]]], role: str, other: str, name: str) -> float:
    """Median over rounds of the ratio within each round."""
    ratios: list[float] = [each[role][name] / each[other][name] for each in rounds]
    return round(statistics.median(ratios), 4)


if __name__ == "__main__":
    main()
