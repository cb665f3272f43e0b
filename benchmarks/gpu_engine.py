"""The processes that the GPU benchmark measures: ``python gpu_engine.py ROLE JSON``, started by ``bench_gpu.py``.

A process says events, one JSON object a line on stdout, and does what it is told on stdin, one word a line; the end of
input is its end. Whatever libraries print goes to stderr. Times are of the system's monotonic clock, in seconds, and so
comparable between processes. Durations inside of the loaders come from wrappers around functions of wooly and vLLM that
are put in place here; nothing else of them is changed.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

now = time.monotonic
SHARE_MIN_BYTES = 16 << 10


class Talk:
    """The conversation with the benchmark."""

    def __init__(self) -> None:
        """Keep stdout for events, and send what libraries print there to stderr."""
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def say(self, event: str, **facts: Any) -> None:
        """Tell an event."""
        self._out.write(json.dumps({"event": event, "at": now(), **facts}) + "\n")

    def words(self) -> Iterator[str]:
        """What it is told, until the end of input."""
        while line := sys.stdin.readline():
            yield line.strip()


class Stopwatch:
    """When calls of functions began and ended, by a label."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Time every call of a module's function or a class's method from now on."""
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return stock(*args, **kwargs)
            finally:
                self.spans[label].append((began, now()))

        setattr(owner, name, staticmethod(timed) if isinstance(stock, MethodType) else timed)


def engine(talk: Talk, job: dict[str, Any]) -> None:
    """A vLLM engine in this process: load, answer once, then decode or prefill when told to.

    ``job``: ``model``, ``load_format``, ``settings`` of the engine, ``batch`` (requests of a decode run; all of a batch
    is answered once before it is ready, if ``warm``).
    """
    from vllm import LLM

    watch = Stopwatch()
    loaded: dict[str, Any] = {}
    if job["load_format"] == "wooly":
        _watch_wooly(watch, loaded)
    else:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        _watch_load(BaseModelLoader, watch, loaded)
    talk.say("imported")
    words = talk.words()
    if job["gate"] and next(words, "") != "start":
        return
    try:
        llm = LLM(
            job["model"],
            load_format=job["load_format"],
            model_loader_extra_config={"fallback": False} if job["load_format"] == "wooly" else {},
            **job["settings"],
        )
        _generate(llm, requests=1, prompt=32, tokens=1)
        first_token = now()
        if job["warm"]:
            _generate(llm, requests=job["batch"], prompt=64, tokens=128)
        talk.say("ready", first_token=first_token, spans=watch.spans, **loaded)
        for word in words:
            talk.say(word, **_measure(llm, word, job["batch"]))
    except Exception as error:
        talk.say("failed", error=f"{type(error).__name__}: {error}")
        raise


def _measure(llm: Any, word: str, batch: int) -> dict[str, Any]:
    shapes = {"decode": (64, 128), "prefill": (512, 1)}
    if word not in shapes:
        raise SystemExit(f"expected one of {', '.join(shapes)} on stdin, got {word!r}")
    prompt, tokens = shapes[word]
    began = now()
    answers = _generate(llm, requests=batch, prompt=prompt, tokens=tokens)
    return {
        "began": began,
        "ended": now(),
        "count": batch * (tokens if word == "decode" else prompt),
        "tokens": answers,
    }


def _generate(llm: Any, *, requests: int, prompt: int, tokens: int) -> list[list[int]]:
    """Greedy answers to prompts of ``prompt`` tokens that differ from the first token on."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [10 + (37 * i + 101 * j) % 500 for j in range(prompt)]} for i in range(requests)]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _watch_load(loader: Any, watch: Stopwatch, loaded: dict[str, Any]) -> None:
    """Time ``load_model``, everything on the GPU included, and note what it took of the GPU's memory."""
    import torch

    stock = loader.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
        began = now()
        model = stock(*args, **kwargs)
        torch.cuda.synchronize()
        watch.spans["load"].append((began, now()))
        loaded.update(
            torch_bytes=torch.cuda.memory_allocated() - allocated,
            device_bytes=free - torch.cuda.mem_get_info()[0],
            sizes=[parameter.nbytes for parameter in model.parameters()],
        )
        return model

    loader.load_model = load_model


def _watch_wooly(watch: Stopwatch, loaded: dict[str, Any]) -> None:
    import wooly_vllm
    from shared_store.client.identify import Checkpoint
    from shared_store.client.session import Session
    from shared_store.torch import load
    from shared_store.torch.bind import Binder
    from shared_store.torch.mapped_model import MappedModel
    from wooly_vllm import compat
    from wooly_vllm.loading import inner_loader, loader
    from wooly_vllm.memory import accounting

    wooly_vllm.register()  # vLLM does so too, where wooly is installed and not only on the path
    watch.watch(accounting, "external_bytes", "accounting")
    watch.watch(Session, "connect", "connect")
    watch.watch(Session, "open", "open")
    watch.watch(Checkpoint, "_hash", "hash")
    watch.watch(MappedModel, "map_for_reading", "map")
    watch.watch(compat, "initialize", "build")
    watch.watch(compat, "post_process_bound", "post_process")
    watch.watch(Binder, "bind", "bind")
    watch.watch(load, "publish", "publish")
    watch.watch(inner_loader.InnerLoader, "load_model", "inner_load")
    _watch_publish_memory(load, loaded)
    _watch_load(loader.WoolyLoader, watch, loaded)


def _watch_publish_memory(load: Any, loaded: dict[str, Any]) -> None:
    """Note the GPU's memory at the moment when the model is loaded and publishing begins."""
    import torch

    stock = load.publish

    def publish(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        loaded.update(
            used_before_publish=total - free,
            cached_before_publish=torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
        )
        return stock(*args, **kwargs)

    load.publish = publish


def ipc_sender(talk: Talk, job: dict[str, Any]) -> None:
    """Tensors of the given ``sizes`` on the GPU; at each word, handles of them (torch's CUDA IPC) go to ``path``."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    tensors = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in job["sizes"]]
    torch.cuda.synchronize()
    talk.say("ready")
    for _ in talk.words():
        handles = [reduce_tensor(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
        Path(job["path"]).write_bytes(pickle.dumps(handles))
        talk.say("shared")


def ipc_receiver(talk: Talk, job: dict[str, Any]) -> None:
    """When told to, make tensors of the handles in ``path``, and say how long that took."""
    import torch

    torch.zeros(1, device="cuda")  # an engine has its context, too, before it attaches
    torch.cuda.synchronize()
    talk.say("imported")
    for _ in talk.words():
        began = now()
        tensors = [rebuild(*given) for rebuild, given in pickle.loads(Path(job["path"]).read_bytes())]
        torch.cuda.synchronize()
        talk.say("ready", attach_s=now() - began, tensors=len(tensors))
        return


def memory_sampler(talk: Talk, job: dict[str, Any]) -> None:
    """Sample the GPU's used memory until told to stop; then say all (time, bytes). A process of its own: no GIL."""
    import select

    import torch

    _, total = torch.cuda.mem_get_info()
    samples = []
    talk.say("ready")
    while not select.select([sys.stdin], [], [], job["interval_s"])[0]:
        samples.append((now(), total - torch.cuda.mem_get_info()[0]))
    talk.say("samples", samples=samples)


def plain_publisher(talk: Talk, job: dict[str, Any]) -> None:
    """Publish checkpoints as plain torch modules, without an engine: each word is the directory of one."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from shared_store.base.keys import weight_key
    from shared_store.client.identify import Checkpoint
    from shared_store.client.session import Session
    from shared_store.torch.devices import backend_of, store_device
    from shared_store.torch.publish import Publication, publish

    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    talk.say("imported")
    for word in talk.words():
        directory, model = Path(word), nn.Module()
        files = sorted(directory.glob("*.safetensors"))
        checkpoint = Checkpoint([(file.name, file) for file in files])
        with Session.connect(name=directory.name) as session:
            with checkpoint.digest(session, timeout_s=600) as digest:
                key = weight_key(digest, {"engine": "torch"})
                opened = session.open(
                    key, name=directory.name, engine="torch", device=store_device(device), publish=True, timeout_s=60
                )
            if opened is not None:
                raise SystemExit(f"{directory} is in the store already")
            for file in files:
                for name, tensor in load_file(file, device=str(device)).items():
                    _put(model, name, nn.Parameter(tensor, requires_grad=False))
            began = now()
            publication = Publication(key, directory.name, "torch", store_device(device), {})
            publish(session, publication, model, backend_of(device), min_bytes=SHARE_MIN_BYTES)
            talk.say("published", seconds=now() - began)
        del model, tensor


def _put(model: Any, name: str, parameter: Any) -> None:
    """Give a module a parameter with a dotted name."""
    from torch import nn

    *path, last = name.split(".")
    for part in path:
        if part not in model._modules:  # noqa: SLF001 - torch modules have no public way to ask
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.register_parameter(last, parameter)


ROLES: dict[str, Callable[[Talk, dict[str, Any]], None]] = {
    role.__name__: role for role in (engine, ipc_sender, ipc_receiver, memory_sampler, plain_publisher)
}


def main() -> None:
    """Play a role until the end of input."""
    role, job = sys.argv[1:]
    try:
        ROLES[role](Talk(), json.loads(job))
    finally:
        if error := sys.exception():
            traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1 if error else 0)  # taking an engine apart takes seconds that nothing here measures


if __name__ == "__main__":
    main()
