"""A model loaded by transformers, in one process, for the benchmark ``hf``.

Relies on transformers (and peft for adapters), and on Linux's ``smaps``.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Talk, play

PROMPT_TOKENS, ANSWER_TOKENS = 32, 16


class Model:
    """A model that is loaded on request.

    ``job``: ``model`` (checkpoint directory), ``wooly`` (share its weights), ``device``, ``dtype``, and ``adapter``
    (seed of random LoRA weights, or null for no adapter).
    """

    def __init__(self, talk: Talk, job: dict[str, Any]) -> None:
        """Import all modules that loading needs, so that its duration excludes imports."""
        import torch
        from transformers import AutoModelForCausalLM

        if job["wooly"]:
            import wooly_hf  # noqa: F401 - registers its device maps
        if job["adapter"] is not None:
            import peft  # noqa: F401 - excluded from the load time
        self._talk, self._job, self._torch, self._model_class = talk, job, torch, AutoModelForCausalLM
        self._model: Any = None

    def load(self) -> None:
        """Load the model, run it once, and read all weights, so that their pages are resident. Send ``loaded``."""
        job, torch = self._job, self._torch
        device_map = f"wooly:{job['device']}" if job["wooly"] else job["device"]
        began = time.monotonic()
        model = self._model_class.from_pretrained(
            job["model"],
            dtype=getattr(torch, job["dtype"]),
            device_map=None if device_map == "cpu" else device_map,  # on a CPU, loading without a map is usual
        )
        self._synchronize()
        took = time.monotonic() - began
        self._model = self._with_adapter(model, job["adapter"])
        for parameter in self._model.parameters():
            parameter.detach().sum()
        prompt = torch.arange(10, 10 + PROMPT_TOKENS, device=self._model.device).unsqueeze(0)
        with torch.no_grad():
            logits = self._model(input_ids=prompt).logits.cpu()
        answer = hashlib.sha256(logits.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        tokens, _ = self._generate(prompt, ANSWER_TOKENS)
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        self._talk.send("loaded", load_s=took, answer=answer, tokens=tokens, weights=weights)

    def memory(self) -> None:
        """Send the memory of this process."""
        self._talk.send("memory", **memory(self._job["model"]))

    def generate(self, batch: int, count: int) -> None:
        """Generate ``count`` tokens for ``batch`` prompts, and send tokens and duration."""
        prompts = self._torch.arange(batch * PROMPT_TOKENS, device=self._model.device).reshape(batch, -1) % 1000 + 10
        tokens, took = self._generate(prompts, count)
        self._talk.send("generated", tokens=tokens, seconds=took, count=batch * count)

    def _generate(self, prompts: Any, count: int) -> tuple[list[list[int]], float]:
        settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        self._synchronize()
        began = time.monotonic()
        with self._torch.no_grad():
            found = self._model.generate(input_ids=prompts, attention_mask=self._torch.ones_like(prompts), **settings)
        self._synchronize()
        took = time.monotonic() - began
        return found[:, prompts.shape[1] :].tolist(), took

    def _with_adapter(self, model: Any, seed: int | None) -> Any:
        if seed is None:
            return model.eval()
        from peft import LoraConfig, get_peft_model

        self._torch.manual_seed(seed)
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config).eval()

    def _synchronize(self) -> None:
        if self._job["device"] != "cpu":
            self._torch.cuda.synchronize()


def memory(checkpoint: str) -> dict[str, int]:
    """Return the proportional set size (bytes) of this process by kind of mapping; see ``proc_pid_smaps(5)``.

    ``allocated`` is its own memory, ``segments`` its share of wooly's segments, ``files`` its share of mapped pages of
    the checkpoint. Libraries are excluded: their share depends on the number of processes, not on how weights load.
    """
    found = {"allocated": 0, "segments": 0, "files": 0}
    kind: str | None = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):
            path = rest[4] if len(rest) > 4 else ""
            if path.startswith("/memfd:wooly"):
                kind = "segments"
            elif path.startswith(checkpoint):
                kind = "files"
            else:
                kind = "allocated" if not path.startswith("/") else None
        elif head == "Pss:" and kind is not None:
            found[kind] += int(rest[0]) * 1024
    return found


def model(talk: Talk, job: dict[str, Any]) -> None:
    """Import, send ``imported``, then execute each word: ``load``, ``memory``, or ``generate BATCH COUNT``."""
    holder = Model(talk, job)
    talk.send("imported", **memory(job["model"]))
    for line in talk.words():
        word, *numbers = line.split()
        getattr(holder, word)(*map(int, numbers))


def main() -> None:
    """Run the role given on the command line."""
    play({"model": model})
