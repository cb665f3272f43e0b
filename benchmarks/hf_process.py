"""The processes that the Hugging Face benchmark measures: ``python hf_process.py ROLE JSON``; see ``bench_hf.py``.

There is one role, ``model``: import everything, load a model when told to, answer, and say what memory the process
holds. They talk by ``gpu_engine.Talk``. Relies on transformers (and peft for adapters), and on Linux's ``smaps``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_engine import Talk

PROMPT_TOKENS, ANSWER_TOKENS = 32, 16


class Holder:
    """One model.

    ``job``: ``model`` (a checkpoint's directory), ``wooly`` (whether its weights are shared), ``device``, ``dtype``,
    and ``adapter``: the seed of random LoRA weights to put on it, or null for none.
    """

    def __init__(self, talk: Talk, job: dict[str, Any]) -> None:
        """Import what loading needs, so that loading does not."""
        import torch
        from transformers import AutoModelForCausalLM

        if job["wooly"]:
            import wooly_hf  # noqa: F401 - makes its device maps known
        if job["adapter"] is not None:
            import peft  # noqa: F401 - one import less to time
        self._talk, self._job, self._torch, self._model_class = talk, job, torch, AutoModelForCausalLM
        self._model: Any = None

    def load(self) -> None:
        """Load it, run it once, and read every byte of its weights, so that all of them are in memory that counts."""
        job, torch = self._job, self._torch
        device_map = f"wooly:{job['device']}" if job["wooly"] else job["device"]
        began = time.monotonic()
        model = self._model_class.from_pretrained(
            job["model"],
            dtype=getattr(torch, job["dtype"]),
            device_map=None if device_map == "cpu" else device_map,  # no map is the usual way to load on a CPU
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
        self._talk.say("loaded", load_s=took, answer=answer, tokens=tokens, weights=weights)

    def memory(self) -> None:
        """Say what this process answers for now."""
        self._talk.say("memory", **memory(self._job["model"]))

    def generate(self, batch: int, count: int) -> None:
        """Say how long so many tokens for so many prompts took."""
        prompts = self._torch.arange(batch * PROMPT_TOKENS, device=self._model.device).reshape(batch, -1) % 1000 + 10
        tokens, took = self._generate(prompts, count)
        self._talk.say("generated", tokens=tokens, seconds=took, count=batch * count)

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
    """Proportional set size (bytes) of this process, by what is mapped; see `proc_pid_smaps(5)`.

    ``allocated``: its own memory. ``segments``: its share of wooly's. ``files``: its share of the checkpoint's pages
    that it has mapped. Libraries are left out: their shares depend on how many processes run, not on how weights load.
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


def main() -> None:
    """Say ``imported``, and then do what is told: ``load``, ``memory``, ``generate BATCH COUNT``."""
    talk, job = Talk(), json.loads(sys.argv[2])
    try:
        holder = Holder(talk, job)
        talk.say("imported", **memory(job["model"]))
        for line in talk.words():
            word, *numbers = line.split()
            getattr(holder, word)(*map(int, numbers))
    except Exception as error:  # the benchmark says it
        traceback.print_exc()
        talk.say("failed", error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
