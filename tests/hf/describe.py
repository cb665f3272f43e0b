"""A loaded model as plain values: models with equal values behave the same."""

from __future__ import annotations

import tempfile
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file


def digest(tensor):
    data = tensor.detach().cpu().contiguous()
    return sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def describe(model):
    """Return tensors by each name (device, dtype, shape, stride, gradient, bytes), ties, answers and saved files."""
    names = {}
    for kind, found in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in found:
            plain = [str(tensor.device), str(tensor.dtype), list(tensor.shape), list(tensor.stride())]
            names[name] = [kind, *plain, tensor.requires_grad, digest(tensor)]
    return {
        "class": type(model).__name__,
        "training": model.training,
        "tensors": names,
        "persistent": sorted(model.state_dict()),
        "ties": ties(model),
        "logits": logits(model),
        "tokens": tokens(model),
        "saved": saved(model),
    }


def ties(model):
    """Return groups of names that are one object."""
    groups = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(tensor), []).append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def logits(model):
    with torch.no_grad():
        return digest(model(torch.arange(3, 40, device=model.device)[None]).logits)


def tokens(model):
    if not model.can_generate():
        return None
    ids = torch.arange(3, 20, device=model.device)[None]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return made[0].tolist()


def saved(model):
    """Return names and bytes of the tensors that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            name: [str(tensor.dtype), list(tensor.shape), digest(tensor)]
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
