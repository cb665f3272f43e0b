"""Checkpoints with random weights, of any transformers class.

They are small and deterministic, and greedy decoding does not fall into repeating one token. Bytes are equal from run
to run under the same versions of torch and transformers; between versions they may differ. Downloads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.models.cache import made_once

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def random_checkpoint(
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
    """Return a checkpoint directory of ``model_class(config)`` with random bf16 weights and a byte-level tokenizer.

    Pass a config with ``initializer_range=0.2``. With the usual 0.02 a random model repeats one token, and equal tokens
    would prove nothing. One-dimensional tensors (norms, biases) get noise on top of their constants, so that no two are
    equal and swapped tensors change the output.

    Args:
        cache: Directory of cached checkpoints.
        name: Name in the cache.
        model_class: A model class of transformers.
        config: Its configuration.
        seed: Seed of all weights.
        tokens: Special tokens that follow the 256 bytes in the vocabulary.
        embeddings: Factor applied to the input embeddings.
        finish: Called with the directory, to add files.
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
    """Return the floating-point buffers that the checkpoint contains, such as a router's bias."""
    stored = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in stored and buffer.is_floating_point()]


def write_tokenizer(directory: Path, tokens: tuple[str, ...] = ()) -> None:
    """Write a byte-level tokenizer without merges (pad 0, bos 1, eos 2, then the 256 bytes) and a chat template.

    ``tokens`` are more special tokens, with ids from 259 on.
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
