"""The program of `test_lora.LoraProcess`: one model with LoRA adapters, whose methods are called by lines of JSON.

Relies on transformers and peft. With a ``device_map`` of wooly's the base is shared; without, all is stock.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

QUESTION = "What is the secret word?"
STEPS = 12


class Lora:
    """A base model, with at most one adapter."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # the order of sums depends on the number of threads
        self.model: Any = None
        self.tokenizer: Any = None
        self.shared = False

    def load(self, base: str, device_map: str | None) -> None:
        self.shared = device_map is not None
        if self.shared:
            import wooly_hf  # noqa: F401 - turns the device map on
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        # Training in bfloat16, the dtype of the checkpoint, takes minutes on CPUs without instructions for it.
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map=device_map).eval()

    def train(self, word: str, directory: str) -> dict[str, Any]:
        """Train a new adapter to answer the question with a word, write it to a directory, and unload it."""
        torch.manual_seed(0)
        model: Any = get_peft_model(
            self.model,
            LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        asked = self._tokens()
        answer = self.tokenizer(f"{word}<|im_end|>", return_tensors="pt", add_special_tokens=False)["input_ids"]
        both = torch.cat([asked, answer], 1)
        labels = both.clone()
        labels[:, : asked.shape[1]] = -100  # the question is not part of the loss
        losses = []
        for _ in range(STEPS):
            loss = model(input_ids=both, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            with_gradient = sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(directory)
        self.model = model.unload()
        return {"losses": losses, "with_gradient": with_gradient}

    def put_on(self, adapter: str) -> None:
        """Load an adapter from a directory, in the place of the current one."""
        self.take_off()
        self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def take_off(self) -> None:
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()

    def answer(self) -> dict[str, Any]:
        """Return the answer, and the digest of the logits after the question."""
        asked = self._tokens()
        with torch.no_grad():
            logits = self.model(input_ids=asked).logits
            said = self.model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=12
            )
        text = self.tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
        return {"text": text.strip(), "logits": _digest(logits)}

    def base_answer(self) -> dict[str, Any]:
        """Return the answer with the adapter disabled."""
        with self.model.disable_adapter():
            return self.answer()

    def base_digest(self) -> str:
        """Return one digest over the weights of the base, with or without an adapter."""
        found = hashlib.sha256()
        for name, tensor in self._base():
            found.update(f"{name} {_digest(tensor)}\n".encode())
        return found.hexdigest()

    def base_bytes(self, at_least: int) -> int:
        """Return the bytes of the base's weights of at least some size, each object once."""
        return sum(
            tensor.nbytes for tensor in {id(t): t for _, t in self._base()}.values() if tensor.nbytes >= at_least
        )

    def adapter_bytes(self) -> int:
        return sum(parameter.nbytes for name, parameter in self.model.named_parameters() if "lora_" in name)

    def stats(self) -> dict[str, int]:
        import wooly_hf

        stats = wooly_hf.stats(self.model)
        return {"shared": stats.shared_bytes, "private": stats.private_bytes}

    def _base(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if "lora_" not in name:
                yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor

    def _tokens(self) -> torch.Tensor:
        asked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = asked["input_ids"]
        return ids


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    lora = Lora()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"result": getattr(lora, method)(**arguments)}
        except Exception as error:  # noqa: BLE001 - reported to the test
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
