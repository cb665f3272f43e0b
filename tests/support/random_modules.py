"""Random trees of torch modules from a specification, and descriptions of all that binding promises."""

from __future__ import annotations

import torch
from torch import nn


def laid_out(spec):
    """Make an uninitialised tensor with a spec's shape (transposed if so) and layout."""
    dtype, shape = getattr(torch, spec["dtype"]), spec["shape"]
    if spec["layout"] == "turned" and len(shape) > 1:
        return torch.empty(shape, dtype=dtype).transpose(0, -1)
    if spec["layout"] == "every second" and shape:
        return torch.empty([*shape[:-1], 2 * shape[-1]], dtype=dtype)[..., ::2]
    if spec["layout"] == "expanded" and shape:
        return torch.empty([1, *shape[1:]], dtype=dtype).expand(shape)
    if spec["layout"] == "offset" and shape:
        return torch.empty([shape[0] + 5, *shape[1:]], dtype=dtype)[5:]
    return torch.empty(shape, dtype=dtype)


class Random(nn.Module):
    """Build a model of a specification, uninitialised as engines do."""

    def __init__(self, spec, before=None):
        super().__init__()
        before = [] if before is None else before
        for number, one in enumerate(spec["tensors"]):
            tensor = laid_out(one)
            if before and one["same"] == "object":
                tensor = before[-1]
            elif before and one["same"] == "storage":
                tensor = before[-1].detach()[..., :1] if before[-1].dim() else before[-1].detach()
            self.take(f"t{number}", tensor, one["kind"])
            before.append(getattr(self, f"t{number}"))
        self.children_ = nn.ModuleList(Random(child, before) for child in spec["children"])
        if spec.get("alias") and spec["children"]:
            self.alias = self.children_[0]

    def take(self, name, tensor, kind):
        if kind == "parameter":
            is_placeholder = isinstance(tensor, nn.Parameter)
            setattr(self, name, tensor if is_placeholder else nn.Parameter(tensor, requires_grad=False))
        elif kind == "attribute":
            self.__dict__[name] = tensor
        else:
            self.register_buffer(name, tensor, persistent=kind == "buffer")


def named(model):
    """Return each tensor by path, with its kind."""
    for path, module in model.named_modules(remove_duplicate=False):
        for kind, group in (("p", module._parameters), ("b", module._buffers), ("a", vars(module))):
            for name, it in group.items():
                if isinstance(it, torch.Tensor) and (it.numel() or kind != "a"):
                    yield f"{path}.{name}", kind, it


def fill(model, spec):
    """Fill all storages; equally for equal `values`."""
    values = [one["values"] for one in every_tensor(spec)] or [0]
    seen = {}
    for number, (_, _, it) in enumerate(named(model)):
        storage = it.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = number
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            pattern = torch.arange(data.numel()) + values[number % len(values)]
            data.copy_(pattern % (2 if it.dtype is torch.bool else 251))


def every_tensor(spec):
    return [*spec["tensors"], *(one for child in spec["children"] for one in every_tensor(child))]


def bytes_of(tensor):
    """Return the elements' bytes in order, whatever their strides."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8).tolist()


def described(model):
    """Return all that binding promises: bytes, dtype, shape, stride, kind, grad, shared objects and shared storages."""
    objects, storages, found = {}, {}, {}
    for path, kind, it in named(model):
        pointer = it.untyped_storage().data_ptr() if it.numel() else 0
        found[path] = [
            kind,
            str(it.dtype),
            list(it.shape),
            list(it.stride()),
            it.requires_grad,
            bytes_of(it.detach()),
            objects.setdefault(id(it), len(objects)),
            storages.setdefault(pointer, len(storages)) if pointer else None,
        ]
    return found
