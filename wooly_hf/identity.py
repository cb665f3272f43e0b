"""The facts of a weight key: every setting that must be equal for two processes to share loaded tensors.

In doubt a setting is included. One too many costs another load (equal tensors are still deduplicated); one too few
would serve wrong weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_store.base import manifest
from shared_store.base.errors import UnsupportedError
from shared_store.base.keys import without_names
from shared_store.torch.devices import store_device
from wooly_hf import compat

_EXTRA_STATE = "_extra_state"


def named_files(files: Sequence[str]) -> list[tuple[str, Path]]:
    """Return checkpoint files with their names relative to the common folder, in the order of reading."""
    paths = [Path(file).absolute() for file in files]
    folder = os.path.commonpath([path.parent for path in paths])
    return [(os.path.relpath(path, folder), path) for path in paths]


def facts(
    model: nn.Module, files: Sequence[tuple[str, Path]], load_config: Any, device: torch.device
) -> dict[str, Any]:
    """Return every setting that shapes the loaded tensors, in plain JSON types.

    Args:
        model: of meta tensors, not loaded yet.
        files: of the checkpoint, in the order of reading.
        load_config: transformers'.
        device: of the weights.

    Raises:
        UnsupportedError: a setting cannot be compared between processes.
    """
    named: Any = model
    return {
        "engine": "transformers",
        "versions": {"transformers": compat.version(), "torch": str(torch.__version__), "manifest": manifest.SCHEMA},
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "prefix": str(named.base_model_prefix),
        "config": without_names(json.loads(named.config.to_json_string(use_diff=False))),
        "files": [name for name, _ in files],
        "dtype": str(load_config.dtype),
        "dtype_plan": {name: str(dtype) for name, dtype in (load_config.dtype_plan or {}).items()},
        "conversions": compat.conversions(load_config),
        "ignore_mismatched_sizes": bool(load_config.ignore_mismatched_sizes),
        "tensors": _tensors(model),
        "device": store_device(device),
    }


def _tensors(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] == _EXTRA_STATE:
            raise UnsupportedError(f"{name} is not a tensor: modules with extra state are not shared")
        found[name] = [list(value.shape), str(value.dtype)]
    return found
