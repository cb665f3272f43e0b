"""LoRA over a shared base: a real chat model, adapters that were really trained, and a process for each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hf.jobs import PRELOADED
from support.actors import Actor
from support.models.cache import CACHE
from support.models.smollm2 import smollm2
from support.stores import StoreProcess

from shared_store.base.status import Status

MAIN = Path(__file__).parents[1] / "support" / "lora_main.py"
WORDS = ("granite", "willow", "copper")
WITHIN_S = 240.0
MAPPED_FROM = 16384
"""Smaller tensors are copied into every process."""

Start = Callable[[str | None], "LoraProcess"]

pytestmark = pytest.mark.timeout(600)


class LoraProcess(Actor):
    """A process whose methods are those of `lora_main.Lora`."""

    def __init__(self, runtime_dir: Path, log: Path) -> None:
        with log.open("ab") as stream:
            self._process = PRELOADED.start(
                str(MAIN),
                environment={**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir), "WOOLY_STRICT": "1"},
                stderr=stream,
                text=False,
            )
        self._unread = b""

    def finish(self, timeout_s: float = WITHIN_S) -> Any:
        return super().finish(timeout_s)

    def kill(self) -> None:
        if not self._process.stdin.closed:
            super().kill()


@pytest.fixture(scope="module")
def start(store: StoreProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a process with the base loaded: shared through one store, or (no device map) stock."""
    base, log, started = smollm2(CACHE), tmp_path_factory.mktemp("logs") / "log", []

    def begin(device_map: str | None) -> LoraProcess:
        started.append(LoraProcess(store.directory, log))
        started[-1].load(base=str(base), device_map=device_map)
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def stock(start: Start, adapters: dict[str, Path]) -> dict[str, Any]:
    """What stock loading gives: the base's answer and digest, each adapter's answer, and the last one's when merged."""
    process = start(None)
    found: dict[str, Any] = {"digest": process.base_digest(), "base": process.answer()}
    found["nbytes"] = process.base_bytes(at_least=MAPPED_FROM)
    for word, directory in adapters.items():
        process.put_on(adapter=str(directory))
        found[word] = process.answer()
    process.merge()
    found["merged"] = process.answer()
    process.kill()
    return found


@pytest.fixture(scope="module")
def training(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three adapters that one process trained over a shared base, and what it found before, meanwhile and after."""
    process = start("wooly:cpu")
    found: dict[str, Any] = {"digest_before": process.base_digest(), "stats_before": process.stats(), "runs": {}}
    found["directories"] = {word: tmp_path_factory.mktemp("adapters") / word for word in WORDS}
    for word, directory in found["directories"].items():
        found["runs"][word] = process.train(word=word, directory=str(directory))
    found |= {"digest_after": process.base_digest(), "stats_after": process.stats(), "answer_after": process.answer()}
    process.kill()
    return found


@pytest.fixture(scope="module")
def adapters(training: dict[str, Any]) -> dict[str, Path]:
    """The adapters' directories by the word that they answer."""
    found: dict[str, Path] = training["directories"]
    return found


@pytest.fixture(scope="module")
def serving(start: Start, adapters: dict[str, Path]) -> dict[str, LoraProcess]:
    """A process for each adapter, all alive, by its word."""
    processes = {}
    for word, directory in adapters.items():
        processes[word] = start("wooly:cpu")
        processes[word].put_on(adapter=str(directory))
    return processes


def test_training_gives_gradients_to_adapters_alone(training: dict[str, Any]):
    """And it learns: what is trained over a shared base is trained."""
    for run in training["runs"].values():
        assert run["losses"][-1] < 0.1 * run["losses"][0]
        assert run["with_gradient"]
        assert all(".lora_A." in name or ".lora_B." in name for name in run["with_gradient"])


def test_training_leaves_the_shared_base_as_it_was(training: dict[str, Any], stock: dict[str, Any]):
    """Bit by bit, and no page of it went private."""
    assert training["digest_before"] == training["digest_after"] == stock["digest"]
    assert training["answer_after"] == stock["base"]
    assert training["stats_before"]["shared"] >= stock["nbytes"]
    assert training["stats_after"]["shared"] == training["stats_before"]["shared"]


def test_adapters_answer_differently_and_as_stock_does(serving: dict[str, LoraProcess], stock: dict[str, Any]):
    """Each its own word, the base another thing, and all logits bit-equal to stock."""
    answers = {word: process.answer() for word, process in serving.items()}
    assert {word: answer["text"] for word, answer in answers.items()} == {word: word for word in WORDS}
    assert stock["base"]["text"] not in WORDS
    assert answers == {word: stock[word] for word in WORDS}
    for process in serving.values():
        assert process.base_answer() == stock["base"]
        assert process.base_digest() == stock["digest"]


def test_three_processes_share_one_base_and_have_their_deltas_alone(
    serving: dict[str, LoraProcess], stock: dict[str, Any], served: Callable[[], Status]
):
    """By the store: one model, three readers. By each process: the base is shared, and the rest is small."""
    status = served()
    (model,) = status.models
    assert model.readers == len(serving)
    assert status.counters.publishes == 1
    for process in serving.values():
        deltas, found = process.adapter_bytes(), process.stats()
        assert deltas > 0
        assert found["shared"] == stock["nbytes"]
        assert deltas <= found["private"] < deltas + (1 << 20)


def test_merging_in_one_process_leaves_the_others_bit_equal(serving: dict[str, LoraProcess], stock: dict[str, Any]):
    """What merging writes goes private in the one that merges; it answers as a stock process that merged."""
    *others, merging = (serving[word] for word in WORDS)
    before = [(process.answer(), process.base_digest(), process.stats()) for process in others]
    unmerged = merging.stats()
    merging.merge()
    assert merging.answer() == stock["merged"]
    assert merging.answer()["text"] == WORDS[-1]
    assert merging.base_digest() != stock["digest"]
    assert merging.stats()["shared"] < unmerged["shared"]
    assert merging.stats()["private"] > unmerged["private"] - stock["nbytes"] // 100
    assert [(process.answer(), process.base_digest(), process.stats()) for process in others] == before
    assert [process.base_digest() for process in others] == [stock["digest"]] * len(others)
