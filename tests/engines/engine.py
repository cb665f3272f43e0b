"""An engine process: ``python engine.py JSON``. Prints one JSON object a line; see :func:`main`.

It is a real vLLM engine in a single process. Its lines are events for the test, which can pause it between steps.
"""

from __future__ import annotations

import gc
import json
import os
import select
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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

CPU_KV_BLOCKS = 128
"""KV cache blocks of engines on a CPU, enough for `max_num_seqs` times `max_model_len` tokens in blocks of 16 or more.
vLLM zeroes the whole cache at the start, which is a GiB otherwise."""


def say(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def wait_for(word: str) -> None:
    """Block until the test sends a line with this word."""
    line = sys.stdin.readline().strip()
    if line != word:
        raise SystemExit(f"expected {word!r} on stdin, got {line!r}")


def tokens_of(llm: Any, count: int = TOKENS) -> list[list[float]]:
    """Return the greedy tokens of each prompt; of an embedding model, the embeddings."""
    from vllm import SamplingParams

    if llm.llm_engine.vllm_config.model_config.runner_type == "pooling":
        prompts = [{"prompt_token_ids": list(p)} for p in PROMPTS]
        return [list(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False)]
    greedy = SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def tokens_one_by_one(llm: Any, adapter: Any = None) -> list[list[int]]:
    """Return greedy tokens of one prompt at a time, as batching can change the last bits."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    outputs = [
        llm.generate({"prompt_token_ids": list(prompt)}, greedy, use_tqdm=False, lora_request=adapter)[0]
        for prompt in PROMPTS
    ]
    return [list(output.outputs[0].token_ids) for output in outputs]


def answers_of_adapters(llm: Any, adapters: dict[str, str]) -> dict[str, Any]:
    """Return tokens of the base, of each adapter, and of the base without them; and where the weights are."""
    from vllm.lora.request import LoRARequest

    numbers = {name: number for number, name in enumerate(sorted(adapters), start=1)}
    answers = {"base": tokens_one_by_one(llm)}
    for name, number in numbers.items():
        answers[name] = tokens_one_by_one(llm, LoRARequest(name, number, adapters[name]))
    weights = where_weights_lie(llm)
    removed = all(llm.llm_engine.remove_lora(number) for number in numbers.values())
    answers["base again"] = tokens_one_by_one(llm)
    return {"with_adapters": answers, "weights": weights, "removed": removed}


def where_weights_lie(llm: Any) -> dict[str, int]:
    """Return the bytes of weights in the store's memory and outside, of adapters, and of private pages of segments.

    By address, from the kernel's view of this process, whichever code made a tensor.
    """
    import torch
    from support.mapped import segment_ranges

    from shared_store.torch.tensors import named_tensors

    weights, deltas = {}, {}
    for held in named_tensors(model_of(llm)):
        if held.name != "kv_cache":
            weights[held.tensor.untyped_storage().data_ptr()] = held.tensor.untyped_storage().nbytes()
    for module in model_of(llm).modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = getattr(module, name, ())
            for tensor in (stacked,) if isinstance(stacked, torch.Tensor) else stacked:
                deltas[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    ranges = segment_ranges()

    def inside(storages: dict[int, int]) -> int:
        return sum(n for address, n in storages.items() if any(it.start <= address < it.end for it in ranges))

    own = {address: nbytes for address, nbytes in weights.items() if address not in deltas}
    return {
        "shared": inside(own),
        "private": sum(own.values()) - inside(own),
        "deltas": sum(deltas.values()),
        "deltas_shared": inside(deltas),
        "written": sum(found.private_bytes for found in ranges),
    }


def under_load(llm: Any, right: list[list[float]], count: int) -> dict[str, int]:
    """Answer until the test sends a line; return the number of rounds, and of answers that differ from `right`."""
    rounds = wrong = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        rounds += 1
        wrong += tokens_of(llm, count) != right
    wait_for("stop")
    return {"rounds": rounds, "wrong": wrong}


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def scribble(llm: Any) -> int:
    """Write to every parameter in place; return their number."""
    import torch

    parameters = list(model_of(llm).parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.data.add_(1)
    return len(parameters)


def make_it_write(llm: Any) -> None:
    """Make the model write to one of its weights in each forward pass."""
    model = model_of(llm)
    weight = max(model.parameters(), key=lambda parameter: parameter.numel())

    def write(*_: Any) -> None:
        weight.data.add_(1)

    model.register_forward_pre_hook(write)


def run_model(engine: Any, model: str, settings: dict[str, Any], job: dict[str, Any]) -> None:
    say("starting", model=model)
    read_before = bytes_read()
    try:
        llm = engine(
            model,
            load_format=job.get("load_format", "auto"),
            model_loader_extra_config=job.get("extra", {}),
            **(SETTINGS | settings),
        )
    except Exception as error:
        say("failed", model=model, error=f"{type(error).__name__}: {error}")
        raise
    count = job.get("count", TOKENS)
    facts: dict[str, Any] = {
        "model": model,
        "bytes_read": bytes_read() - read_before,
        "kv_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "tokens": tokens_of(llm, count),
    }
    if job.get("lease", job.get("load_format") == "wooly"):
        facts |= lease_of_this_process()
    if settings.get("enable_lora") and not job.get("obey"):
        facts |= answers_of_adapters(llm, job["adapters"])
    if job.get("scribble"):
        facts["scribbled"] = scribble(llm)
        facts["tokens_after"] = tokens_of(llm)
    say("answered", **facts)
    if job.get("writes"):
        make_it_write(llm)
        say("answered after a write", model=model, tokens=tokens_of(llm))
    if job.get("load"):
        say("worked", model=model, **under_load(llm, facts["tokens"], count))
    if job.get("obey"):
        obey(llm, job)
    if job.get("hold"):
        wait_for("go on")
        say("answered again", model=model, tokens=tokens_of(llm))
    del llm
    gc.collect()
    end_groups()


def end_groups() -> None:
    """Destroy the process groups that 0.26 and 0.29 leave behind, which fit the first model of a process.

    A mixture of experts after a dense model would have no group for its experts.
    """
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()


def all_answers(llm: Any, adapters: dict[str, str]) -> dict[str, list[list[int]]]:
    """Return tokens of the base and of each adapter, one prompt at a time."""
    from vllm.lora.request import LoRARequest

    numbered = enumerate(sorted(adapters), start=1)
    found = {name: tokens_one_by_one(llm, LoRARequest(name, number, adapters[name])) for number, name in numbered}
    return {"base": tokens_one_by_one(llm), **found}


def obey(llm: Any, job: dict[str, Any]) -> None:
    """Run the test's commands, one a line, until `stop`; print the result of each (`did`, with its number)."""
    adapters = job.get("adapters", {})
    for number, line in enumerate(iter(lambda: sys.stdin.readline().split(), ["stop"]), start=1):
        facts: dict[str, Any] = {}
        try:
            facts = do(llm, adapters, *line)
        except Exception as error:  # noqa: BLE001 - reported to the test
            facts["error"] = f"{type(error).__name__}: {error}"
        say(f"did {number}", **facts)


def do(llm: Any, adapters: dict[str, str], what: str, *words: str) -> dict[str, Any]:
    """Run one command of the test."""
    if what == "answer":
        return {"answers": all_answers(llm, adapters)}
    if what == "sleep":
        llm.sleep(level=int(words[0]))
    elif what == "wake":
        llm.wake_up(list(words) or None)
    elif what == "cycles":
        return cycles(llm, adapters, int(words[0]))
    elif what == "rpc":
        llm.collective_rpc(words[0], args=tuple(json.loads(word) for word in words[1:]))
    elif what == "pools":
        return pools()
    elif what == "gate":
        from support import gating

        return gating.run(llm, words[0], json.loads(words[1]) if words[1:] else {})
    elif what == "turn":
        from support import turning

        return turning.run(llm, words[0], json.loads(words[1]) if words[1:] else {})
    elif what == "move":
        from support import moving

        return moving.run(llm, words[0], json.loads(words[1]) if words[1:] else {})
    else:
        raise ValueError(what)
    return lease_of_this_process()


def cycles(llm: Any, adapters: dict[str, str], count: int) -> dict[str, Any]:
    """Sleep, wake and answer `count` times; return the number of wrong answers, and of weights that moved."""
    right = all_answers(llm, adapters)
    where = {name: parameter.data_ptr() for name, parameter in model_of(llm).named_parameters()}
    wrong = 0
    for _ in range(count):
        llm.sleep(level=1)
        llm.wake_up()
        wrong += all_answers(llm, adapters) != right
    now = {name: parameter.data_ptr() for name, parameter in model_of(llm).named_parameters()}
    return {"wrong": wrong, "moved": sum(now[name] != address for name, address in where.items()), "answers": right}


def pools() -> dict[str, int]:
    """Return the bytes in vLLM's pool for sleep mode, by tag, and in torch's own pool."""
    import torch
    from vllm.device_allocator.cumem import CuMemAllocator

    found: dict[str, int] = {"torch": torch.cuda.memory_reserved()}
    for data in CuMemAllocator.get_instance().pointer_to_data.values():
        found[data.tag] = found.get(data.tag, 0) + data.handle[1]
    return found


def bytes_read() -> int:
    """Return the bytes that this process got from read(2) and similar calls, by the kernel (``proc_pid_io(5)``)."""
    with open("/proc/self/io", encoding="ascii") as lines:  # noqa: PTH123 - one line of it is wanted
        return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def lease_of_this_process() -> dict[str, Any]:
    """Return the store's facts about the last lease of this process."""
    from shared_store.client.session import Session

    with Session.connect(autostart=False) as session:
        leases = [client for client in session.status().clients if client.pid == os.getpid() and client.key]
    last = leases[-1] if leases else None
    return {
        "role": last.role if last else None,
        "mapped_bytes": last.mapped_bytes if last else 0,
        "private_bytes": last.private_bytes if last else 0,
    }


def freeze_imports() -> None:
    """Exclude the objects that exist now, mostly modules, from garbage collection for good.

    vLLM collects several times for each engine, and would visit hundreds of thousands of such objects each time. It
    freezes a started engine and unfreezes everything when one ends; here engines are not frozen at all.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM
    from vllm.platforms import current_platform

    freeze_imports()
    if current_platform.is_cpu():
        SETTINGS["num_gpu_blocks_override"] = CPU_KV_BLOCKS
    say("imported", pid=os.getpid())
    if job.get("gate"):
        wait_for("start")
    given = job.get("settings", {})
    each = given if isinstance(given, list) else [given] * len(job["models"])
    for model, settings in zip(job["models"], each, strict=True):
        run_model(LLM, model, settings, job)
    say("done")


if __name__ == "__main__":
    main()
