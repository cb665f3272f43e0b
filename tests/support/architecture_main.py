"""Load models with transformers and report everything about them that can be compared.

Its argument is a JSON file: ``names`` of architectures, the directory ``checkpoints``, the ``device_map`` for
`from_pretrained`, and the file ``report`` to write: facts by name and dtype, as JSON. If one model fails, its facts are
its ``error``. Bytes are reported by digest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from support.architectures import ARCHITECTURES, Architecture

from shared_store.base.errors import DeclinedError, StoreUnavailableError
from shared_store.client.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NEW_TOKENS = 8


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    by_name = {each.name: each for each in ARCHITECTURES}
    report: dict[str, dict[str, Any]] = {}
    for name in job["names"]:
        for dtype in (by_name[name].stored, by_name[name].other_dtype):
            try:
                found = examine(by_name[name], Path(job["checkpoints"]) / name, dtype, job["device_map"])
            except Exception:  # noqa: BLE001 - the test of this model shows it
                found = {"error": traceback.format_exc()}
            report.setdefault(name, {})[dtype] = found
    Path(job["report"]).write_text(json.dumps(report))


def examine(architecture: Architecture, checkpoint: Path, dtype: str, device_map: str | None) -> dict[str, Any]:
    """Load one model in one dtype, run it, save it, and return the facts."""
    model_class = architecture.model_class()
    if device_map:
        import wooly_hf

    torch.manual_seed(0)  # heads that the checkpoint lacks are random
    before = counters()
    model, info = model_class.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), device_map=device_map, output_loading_info=True
    )
    after = counters()
    facts = {
        "counted": {name: after[name] - before.get(name, 0) for name in after},
        "info": {name: sorted(map(str, keys)) for name, keys in info.items()},
        "training": model.training,
        "dtype": str(model.dtype),
        "parameters": {name: described(parameter) for name, parameter in every(model, "_parameters")},
        "buffers": {name: [*described(buffer), persists(model, name)] for name, buffer in every(model, "_buffers")},
        "attributes": {name: described(tensor) for name, tensor in attributes(model)},
        "ties": same(every(model, "_parameters"), id),
        "overlaps": same(every(model, "_parameters"), lambda parameter: parameter.untyped_storage().data_ptr()),
    }
    if device_map:
        facts["stats"] = asdict(wooly_hf.stats(model))
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in architecture.inputs(model.config).items()
    }
    with torch.no_grad():
        outputs = dict(tensors("", model(**inputs)))
    facts["outputs"] = {name: described(value) for name, value in outputs.items()}
    facts["varied"] = all(value.isfinite().all() for value in outputs.values()) and varied(next(iter(outputs.values())))
    if architecture.generates:
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        facts["tokens"] = answer.tolist()
    if device_map:
        facts["swapped"] = swapped(model, inputs)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        facts["saved"] = saved(Path(directory))
    return facts


def swapped(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Have this process swapped out; return its state then, and the outputs of the next call."""
    from wooly_hf.workload import process

    workload = process.current()
    assert workload is not None
    try:
        with Session.connect(autostart=False, name="examiner") as session:
            session.workloads.move(workload.name, out=True)
    except DeclinedError as error:
        return {"declined": str(error)}
    state = workload.state.value
    with torch.no_grad():
        return {"state": state, "outputs": {name: described(it) for name, it in tensors("", model(**inputs))}}


def counters() -> dict[str, int]:
    """Return the store's counters; none where no store runs."""
    try:
        with Session.connect(autostart=False, name="examiner") as session:
            counted = session.status().counters
    except StoreUnavailableError:
        return {}
    return {name: getattr(counted, name) for name in counted.__struct_fields__}


def every(model: torch.nn.Module, registry: str) -> Iterator[tuple[str, Any]]:
    """Yield each parameter or buffer under each of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in getattr(module, registry).items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def attributes(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield tensors that are plain attributes of modules."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}".lstrip("."), value


def persists(model: torch.nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last not in model.get_submodule(path)._non_persistent_buffers_set


def described(tensor: torch.Tensor) -> list[Any]:
    """Return type, dtype, shape, stride, device, whether it takes a gradient, and the digest of its values."""
    kind = type(tensor).__name__
    layout = [str(tensor.dtype), list(tensor.shape), list(tensor.stride()), str(tensor.device), tensor.requires_grad]
    return [kind, *layout, None if tensor.is_meta else digest(tensor)]


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""
    return hashlib.sha256(data).hexdigest()


def same(tensors: Iterable[tuple[str, Any]], by: Any) -> list[list[str]]:
    """Return groups of two or more names whose tensors have the same value of `by`."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            groups.setdefault(by(tensor), []).append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating tensors in nested outputs, with their paths."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors(f"{name}.{index}", part)


def varied(output: torch.Tensor) -> bool:
    """Return whether most values of an output differ, so that it depends on the weights."""
    return len(output.float().unique()) > output.numel() ** 0.5


def saved(directory: Path) -> dict[str, Any]:
    """Return the digest of each file of a saved model, and a description of each tensor in it."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}
    keys: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys |= {key: described(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118 - no dict
    return {"files": files, "tensors": keys}


main()
