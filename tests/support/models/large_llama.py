"""A large model for GPUs: a Llama-shaped checkpoint with random bf16 weights, and fine-tunes of it.

Each layer has its own shard, so that a fine-tune shares the files (hard links) of its unchanged layers. Relies on torch
and safetensors; fast only with a GPU. Bytes are equal for equal seeds on the same kind of device only.

    python tests/support/models/large_llama.py make DIRECTORY [--layers 16]
    python tests/support/models/large_llama.py finetune SOURCE TARGET --changed 0 1 --seed 1
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama. With the defaults, 16 layers are 9.08 GB."""

    hidden: int = 4096
    intermediate: int = 14336
    vocabulary: int = 128_256
    heads: int = 32
    kv_heads: int = 8


LLAMA = Shape()


def make(directory: Path, layers: int = 16, seed: int = 0, shape: Shape = LLAMA) -> None:
    """Write a checkpoint if the directory has none. ``config.json`` is written last and marks a complete checkpoint."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    draw = _Draw(seed)
    head_dim = shape.hidden // shape.heads
    outside = {
        "model.embed_tokens.weight": draw.matrix(shape.vocabulary, shape.hidden),
        "lm_head.weight": draw.matrix(shape.vocabulary, shape.hidden),
        "model.norm.weight": draw.norm(shape.hidden),
    }
    files = dict.fromkeys(outside, "model-embeddings.safetensors")
    total = _save(directory / "model-embeddings.safetensors", outside)
    for layer in range(layers):
        tensors = {
            "self_attn.q_proj": draw.matrix(shape.hidden, shape.hidden),
            "self_attn.k_proj": draw.matrix(shape.kv_heads * head_dim, shape.hidden),
            "self_attn.v_proj": draw.matrix(shape.kv_heads * head_dim, shape.hidden),
            "self_attn.o_proj": draw.matrix(shape.hidden, shape.hidden),
            "mlp.gate_proj": draw.matrix(shape.intermediate, shape.hidden),
            "mlp.up_proj": draw.matrix(shape.intermediate, shape.hidden),
            "mlp.down_proj": draw.matrix(shape.hidden, shape.intermediate),
            "input_layernorm": draw.norm(shape.hidden),
            "post_attention_layernorm": draw.norm(shape.hidden),
        }
        named = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
        file = f"model-layer-{layer:03d}.safetensors"
        files |= dict.fromkeys(named, file)
        total += _save(directory / file, named)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    _write_json(directory / "config.json", _config(layers, shape))


def finetune(source: Path, target: Path, changed_layers: Collection[int], seed: int = 1) -> None:
    """Copy a checkpoint with new weights in some layers, if the target has none. Other shards are hard links."""
    if (target / "config.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    draw = _Draw(seed)
    prefixes = tuple(f"model.layers.{layer}." for layer in changed_layers)
    files: dict[str, str] = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for file in sorted(set(files.values())):
        if any(files[name] == file for name in files if name.startswith(prefixes)):
            _rewrite(source / file, target / file, prefixes, draw)
        else:
            _link(source / file, target / file)
    shutil.copyfile(source / INDEX, target / INDEX)
    shutil.copyfile(source / "config.json", target / "config.json")


def run(*arguments: str) -> None:
    """Run this module in a separate process, which frees its CUDA context when it ends."""
    subprocess.run([sys.executable, __file__, *arguments], check=True, timeout=600)


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return int(json.loads((directory / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"])


def layer_count(directory: Path) -> int:
    """Return the number of layers of a checkpoint."""
    return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def unique_bytes(directories: Collection[Path]) -> int:
    """Return the bytes of distinct tensors (by digest) in the files of checkpoints. Hard links are read once."""
    by_inode = {file.stat().st_ino: file for directory in directories for file in directory.glob("*.safetensors")}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: dict(_digests(file)), by_inode.values())
    return sum({key: size for digests in found for key, size in digests.items()}.values())


def _digests(file: Path) -> Iterator[tuple[bytes, int]]:
    """Yield digest and size of each tensor in a safetensors file (8 bytes of length, a JSON header, the data)."""
    from shared_store.base.digest import digest

    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        with memoryview(content) as view:
            for name, entry in header.items():
                if name != "__metadata__":
                    first, end = (8 + length + offset for offset in entry["data_offsets"])
                    with view[first:end] as part:
                        yield digest(part), end - first


class _Draw:
    """Random tensors, drawn on the GPU if there is one."""

    def __init__(self, seed: int) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(device=self._device).manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        return self._normal(shape).mul_(0.02).bfloat16().cpu()

    def norm(self, size: int) -> torch.Tensor:
        """Return values around one that differ from tensor to tensor."""
        return self._normal((size,)).mul_(0.05).add_(1).bfloat16().cpu()

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.norm(*tensor.shape) if tensor.dim() == 1 else self.matrix(*tensor.shape)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        return torch.randn(shape, generator=self._generator, device=self._device)


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> int:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _rewrite(source: Path, target: Path, prefixes: tuple[str, ...], draw: _Draw) -> None:
    from safetensors.torch import load_file

    tensors = load_file(source)
    _save(target, {name: draw.like(old) if name.startswith(prefixes) else old for name, old in tensors.items()})


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # left by an interrupted run
    try:
        target.hardlink_to(source)
    except OSError:  # a different file system
        shutil.copyfile(source, target)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _config(layers: int, shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def main() -> None:
    """Make or fine-tune a checkpoint."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a checkpoint with random weights")
    making.add_argument("directory", type=Path)
    making.add_argument("--layers", type=int, default=16, help="number of layers (default 16)")
    making.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    making.add_argument("--vocabulary", type=int, default=LLAMA.vocabulary, help="number of tokens")
    tuning = commands.add_parser("finetune", help="copy a checkpoint with new weights in some layers")
    tuning.add_argument("source", type=Path)
    tuning.add_argument("target", type=Path)
    tuning.add_argument("--changed", type=int, nargs="+", required=True, help="numbers of the changed layers")
    tuning.add_argument("--seed", type=int, default=1, help="seed of the new weights (default 1)")
    arguments = options.parse_args()
    if arguments.command == "make":
        make(arguments.directory, arguments.layers, arguments.seed, replace(LLAMA, vocabulary=arguments.vocabulary))
    else:
        finetune(arguments.source, arguments.target, arguments.changed, arguments.seed)


if __name__ == "__main__":
    main()
