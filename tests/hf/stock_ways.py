"""Ways of loading that cannot be shared: the code for each, and the reason that wooly gives.

The code runs in a job with ``path``, ``folder`` (private to the test) and ``device_map``, and sets ``my_model``.
Nothing is simulated: several processes, or another package, are used where they are needed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import __version__ as transformers_version

BLOCK = 128


@dataclass(frozen=True)
class Way:
    """A way of loading.

    Attributes:
        reason: part of the message.
        code: runs in a job.
        weights: the file with the weights, below the checkpoint.
        prepare: converts a checkpoint for this way.
        ranks: number of processes that load together.
        answer: an expression to compare with stock loading.
        unavailable: why it cannot run here.
    """

    reason: str
    code: str = "my_model = load(path, device_map)"
    weights: str = "model.safetensors"
    prepare: Any = None
    ranks: int = 1
    answer: str = "logits(my_model)"
    unavailable: str = ""


def quantize(path: Path) -> None:
    """Store the layers of a model in fp8 with a scale for each block, as fine-grained fp8 checkpoints do."""
    state = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            state[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).transpose(1, 2)
        scale = blocks.abs().amax((2, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scaled = (blocks / scale[..., None, None]).transpose(1, 2).reshape(rows, columns)
        state[name] = scaled.to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".weight_scale_inv")] = scale
    save_file(state, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (path / "config.json").write_text(json.dumps(config))


def to_gguf(path: Path) -> None:
    """Write a Llama as one GGUF file, with matrices in 8 bits."""
    config = json.loads((path / "config.json").read_text())
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        data = tensor.float().numpy()
        if data.ndim > 1:
            writer.add_tensor(f"{names.get_name(module)}.{suffix}", gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(module)}.{suffix}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (path / "model.safetensors").unlink()


def divide(path: Path) -> None:
    """Save a model as a distributed checkpoint, from two processes with a half each."""
    from hf.jobs import Job

    target = path.with_name(f"{path.name}-divided")
    code = MEET + (
        "from transformers.distributed import DistributedConfig\n"
        "half = load(path, None, distributed_config=DistributedConfig(fsdp_size=2, tp_size=1))\n"
        "half.save_pretrained(target, distributed_checkpoint=True)\n"
        "torch.distributed.barrier()"
    )
    jobs = [Job(path, path.with_name(f"{path.name}-{rank}.log"), **as_rank(rank, 2)) for rank in range(2)]
    try:
        for one in jobs:
            one.begin(code, path=path, target=target, folder=path.parent)
        for one in jobs:
            one.finish()
    finally:
        for one in jobs:
            one.kill()
    shutil.rmtree(path)
    target.rename(path)
    (path / "model.safetensors").symlink_to(min(path.glob("shard-*.safetensors")).name)


def as_rank(rank: int, ranks: int) -> dict[str, str]:
    """Return the environment of one of several processes, as torchrun sets it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


MEET = """
import os
import torch.distributed
if not torch.distributed.is_initialized():
    meeting = torch.distributed.FileStore(folder + "/meeting", int(os.environ["WORLD_SIZE"]))
    torch.distributed.init_process_group(
        "gloo", store=meeting, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
"""

WAYS = {
    "quantized": Way(
        "quantized weights (fp8) are not shared",
        prepare=quantize,
        unavailable="transformers 5.16 fails on fp8 by itself"
        if Version(transformers_version) < Version("5.17")
        else "",
    ),
    "GGUF": Way(
        "GGUF files are converted",
        "my_model = transformers.LlamaForCausalLM.from_pretrained(path, gguf_file='model.gguf', device_map=device_map)",
        weights="model.gguf",
        prepare=to_gguf,
    ),
    "state dict": Way(
        "passed as a state dict",
        """
config = transformers.AutoConfig.from_pretrained(path)
generator = torch.Generator().manual_seed(0)
state = {name: torch.randn(it.shape, generator=generator).bfloat16()
         for name, it in transformers.LlamaForCausalLM(config).state_dict().items()}
my_model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, device_map=device_map, state_dict=state)
""",
    ),
    "several devices": Way(
        "several devices (cpu, disk)",
        "my_model = load(path, {'model': device_map or 'cpu', 'lm_head': 'disk'}, offload_folder=folder)",
    ),
    "all on the disk": Way(
        "weights on the disk cannot be shared",
        "device_map = 'wooly:auto' if device_map else 'auto'\n"
        "my_model = load(path, device_map, max_memory={'cpu': 0}, offload_folder=folder)",
        answer="digest(torch.no_grad()(my_model)(torch.arange(3, 40)[None]).logits)",
    ),
    "no store": Way(
        "no store at",
        """
import os
here = os.environ["WOOLY_RUNTIME_DIR"]
os.environ["WOOLY_RUNTIME_DIR"] = folder
try: my_model = load(path, device_map)
finally: os.environ["WOOLY_RUNTIME_DIR"] = here
""",
    ),
    "FSDP": Way(
        "FSDP divides weights",
        MEET
        + """
os.environ.update(ACCELERATE_USE_FSDP="1", FSDP_CPU_RAM_EFFICIENT_LOADING="1")
try: my_model = load(path, device_map)
finally:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"): del os.environ[name]
""",
    ),
    "ZeRO-3": Way(
        "DeepSpeed ZeRO-3 divides weights",
        MEET
        + """
import deepspeed
from transformers.integrations import HfDeepSpeedConfig
deepspeed.init_distributed("gloo")
zero3 = HfDeepSpeedConfig({
    "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}})
try: my_model = load(path, device_map)
finally: del zero3
with deepspeed.zero.GatheredParameters(list(my_model.parameters())):
    whole = {name: digest(it) for name, it in my_model.named_parameters()}
""",
        answer="[whole, [it.numel() for it in my_model.parameters()]]",
        unavailable=""
        if importlib.util.find_spec("deepspeed")
        else "needs DeepSpeed, which is in no extra: `pip install deepspeed` (and ninja with a C++ compiler)",
    ),
    "tensor parallelism": Way(
        "a device mesh (tensor, expert, pipeline or data parallelism) divides weights",
        MEET
        + """
from transformers.distributed import DistributedConfig
my_model = load(path, device_map, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2))
""",
        ranks=2,
        answer="[logits(my_model), str(type(my_model.model.layers[0].self_attn.q_proj.weight))]",
    ),
    "distributed checkpoint": Way(
        "distributed checkpoints",
        prepare=divide,
        unavailable=""
        if Version(transformers_version) >= Version("5.23")
        else f"transformers {transformers_version} has none",
    ),
}
