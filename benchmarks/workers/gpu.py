"""Processes of the benchmark ``gpu`` without an engine: torch's CUDA IPC, a memory sampler, a publisher."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, now, play

SHARE_MIN_BYTES = 16 << 10


def ipc_sender(talk: Talk, job: dict[str, Any]) -> None:
    """Allocate GPU tensors of ``sizes`` (bytes); for each word, write their CUDA IPC handles (torch's) to ``path``."""
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    tensors = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in job["sizes"]]
    torch.cuda.synchronize()
    talk.send("ready")
    for _ in talk.words():
        handles = [reduce_tensor(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
        Path(job["path"]).write_bytes(pickle.dumps(handles))
        talk.send("shared")


def ipc_receiver(talk: Talk, job: dict[str, Any]) -> None:
    """On a word, open the tensors whose handles are in ``path``, and send the duration."""
    import torch

    torch.zeros(1, device="cuda")  # an engine also has a context before it attaches
    torch.cuda.synchronize()
    talk.send("imported")
    for _ in talk.words():
        began = now()
        tensors = [rebuild(*given) for rebuild, given in pickle.loads(Path(job["path"]).read_bytes())]
        torch.cuda.synchronize()
        talk.send("ready", attach_s=now() - began, tensors=len(tensors))
        return


def memory_sampler(talk: Talk, job: dict[str, Any]) -> None:
    """Sample the GPU's used memory every ``interval_s`` until a word comes; send all samples (time, bytes).

    A process of its own, so that no Python code of the measured process delays it.
    """
    import select

    import torch

    _, total = torch.cuda.mem_get_info()
    samples = []
    talk.send("ready")
    while not select.select([sys.stdin], [], [], job["interval_s"])[0]:
        samples.append((now(), total - torch.cuda.mem_get_info()[0]))
    talk.send("samples", samples=samples)


def plain_publisher(talk: Talk, job: dict[str, Any]) -> None:
    """Publish checkpoints as plain torch modules, without an engine. Each word is the directory of one."""
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
    talk.send("imported")
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
                raise ValueError(f"{directory} is already in the store")
            for file in files:
                for name, tensor in load_file(file, device=str(device)).items():
                    _put(model, name, nn.Parameter(tensor, requires_grad=False))
            began = now()
            publication = Publication(key, directory.name, "torch", store_device(device), {})
            publish(session, publication, model, backend_of(device), min_bytes=SHARE_MIN_BYTES)
            talk.send("published", seconds=now() - began)
        del model, tensor


def _put(model: Any, name: str, parameter: Any) -> None:
    """Add a parameter with a dotted name to a module."""
    from torch import nn

    *path, last = name.split(".")
    for part in path:
        if part not in model._modules:  # noqa: SLF001 - torch modules have no public way to ask
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.register_parameter(last, parameter)


def main() -> None:
    """Run the role given on the command line."""
    play({role.__name__: role for role in (ipc_sender, ipc_receiver, memory_sampler, plain_publisher)})
