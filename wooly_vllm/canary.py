"""Find tensors of a model that an engine writes to after loading: ``python -m wooly_vllm.canary MODEL``.

Shared tensors are mapped read-only. Small ones are copied, because engines write to some of them, such as scales. A
write to a large one would crash the engine. The canary finds such writes without sharing anything: it loads the model
with vLLM's own loader, digests every tensor that the model reaches, lets the engine warm up (compile, capture CUDA
graphs) and answer some requests, and digests all tensors again, on the model's device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shared_store.torch.devices import work_on
from shared_store.torch.load import SHARE_MIN_BYTES
from shared_store.torch.reach import Step, tensors_from
from shared_store.torch.views import bytes_in, storage_key
from wooly_vllm import compat
from wooly_vllm.loading.inner_loader import InnerLoader

LOAD_FORMAT = "wooly-canary"


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor whose memory an engine wrote to.

    Attributes:
        path: the first path to it from the model.
        dtype: torch's name.
        shape: of the tensor.
        nbytes: size of its storage.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def would_be_shared(self) -> bool:
        """True if wooly would map it read-only, so that the write would crash the engine."""
        return self.nbytes >= SHARE_MIN_BYTES


class Watch:
    """The storages of a model's tensors, and their digests when this object was made."""

    def __init__(self, model: nn.Module) -> None:
        """Digest all tensors that the model reaches, and keep them alive."""
        self._found: dict[Any, tuple[Step, torch.Tensor]] = {}
        for step, tensor in tensors_from(model):
            if tensor.numel() and (key := storage_key(tensor)) is not None:
                self._found.setdefault(key, (step, tensor))
        self._digests = self._digest()

    def __len__(self) -> int:
        return len(self._found)

    def written(self) -> list[Written]:
        """Return the tensors whose bytes have changed since."""
        return [
            Written(step.path, str(tensor.dtype), tuple(tensor.shape), tensor.untyped_storage().nbytes())
            for (step, tensor), before, now in zip(self._found.values(), self._digests, self._digest(), strict=True)
            if before != now
        ]

    def _digest(self) -> list[bytes]:
        digests: dict[int, bytes] = {}
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for number, (_, tensor) in enumerate(self._found.values()):
            by_device.setdefault(tensor.device, []).append((number, bytes_in(tensor.untyped_storage())))
        for device, numbered in by_device.items():
            work = work_on(device)
            work.settle()
            digests.update(
                zip((number for number, _ in numbered), work.digests([it for _, it in numbered]), strict=True)
            )
        return [digests[number] for number in range(len(self._found))]


class CanaryLoader(InnerLoader):
    """vLLM's own loader, which watches the models that it loads."""

    watches: list[Watch] = []  # noqa: RUF012 - of this process, on purpose
    """One for each loaded model; a draft model is another."""

    def __init__(self, load_config: Any) -> None:
        """Load as the load format ``auto`` does."""
        super().__init__(dataclasses.replace(load_config, load_format="auto"))

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load a model, and digest it."""
        model = super().load_model(*args, **kwargs)
        self.watches.append(Watch(model))
        return model


def install() -> None:
    """Register the load format with vLLM."""
    compat.register_loader(LOAD_FORMAT, CanaryLoader)


def written() -> list[Written]:
    """Return the tensors that engines of this process have written to since they loaded."""
    return [found for watch in CanaryLoader.watches for found in watch.written()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 if no tensor that would be shared was written to, else 1."""
    parser = argparse.ArgumentParser(prog="python -m wooly_vllm.canary", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="directory or name of the model, as for `vllm serve`")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="keyword arguments of vLLM's LLM class"
    )
    parser.add_argument("--requests", type=int, default=4, help="number of requests, with growing prompts (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model must be in this process
    from vllm import LLM, SamplingParams

    install()
    engine = LLM(given.model, load_format=LOAD_FORMAT, **{"skip_tokenizer_init": True, **given.engine_args})
    after_warm_up = written()
    greedy = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 100 for j in range(8 * (i + 1))]} for i in range(given.requests)]
    if engine.llm_engine.vllm_config.model_config.runner_type == "pooling":
        engine.embed(prompts, use_tqdm=False)
    else:
        engine.generate(prompts, greedy, use_tqdm=False)
    found = written()
    _report(found, {one.path for one in after_warm_up}, sum(map(len, CanaryLoader.watches)), as_json=given.json)
    return int(any(one.would_be_shared for one in found))


def _report(found: Sequence[Written], early: set[str], watched: int, *, as_json: bool) -> None:
    rows = [
        {
            **dataclasses.asdict(one),
            "would_be_shared": one.would_be_shared,
            "during": "warm-up" if one.path in early else "requests",
        }
        for one in found
    ]
    if as_json:
        sys.stdout.write(json.dumps({"vllm": compat.version(), "watched": watched, "written": rows}) + "\n")
        return
    for row in rows:
        kind = "would be shared" if row["would_be_shared"] else "small, stays private"
        sys.stdout.write(
            f"{row['path']}: {row['dtype']} {row['shape']}, {row['nbytes']} bytes ({kind}), {row['during']}\n"
        )
    sys.stdout.write(f"{len(rows)} of {watched} storages were written to after loading\n")


if __name__ == "__main__":
    sys.exit(main())
