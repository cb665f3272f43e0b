"""Every architecture, in the dtype of its checkpoint and in another one: sharing gives what stock loading gives.

Three processes load all models: one without wooly; a publisher; and, after that has ended, a reader of the same store.
Their reports are compared here, aspect by aspect.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hf.jobs import PRELOADED
from support.architectures import ARCHITECTURES
from support.engines import private_store_directory, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.preloaded import Process

    from shared_store.base.status import Status

SUPPORT = Path(__file__).resolve().parents[1] / "support"
MAKER, EXAMINER = SUPPORT / "checkpoints_main.py", SUPPORT / "architecture_main.py"
CASES = [(each.name, dtype) for each in ARCHITECTURES for dtype in (each.stored, each.other_dtype)]
GENERATING = {each.name for each in ARCHITECTURES if each.generates}
WITHIN_S = 500

# All models are loaded and run in the set-up of the first test.
pytestmark = pytest.mark.timeout(4 * WITHIN_S)


@dataclass(frozen=True)
class Examined:
    """Facts by name and dtype from each process, and the store's status after the last one ended."""

    stock: dict[str, dict[str, Any]]
    publisher: dict[str, dict[str, Any]]
    reader: dict[str, dict[str, Any]]
    status: Status


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examined]:
    """Run the three processes and return their reports."""
    checkpoints, reports = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("reports")

    def run(name: str, *command: str, **environment: str) -> Process:
        with (reports / f"{name}.log").open("wb") as log:
            return PRELOADED.start(
                *command, environment={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, stdout=log
            )

    def begin(role: str, runtime_dir: Path) -> Process:
        job = {
            "names": [each.name for each in ARCHITECTURES],
            "checkpoints": str(checkpoints),
            "device_map": None if role == "stock" else "wooly:cpu",
            "report": str(reports / f"{role}.json"),
        }
        (reports / f"{role}.job").write_text(json.dumps(job))
        store = {"WOOLY_RUNTIME_DIR": str(runtime_dir), "WOOLY_STRICT": "1"}
        return run(role, str(EXAMINER), str(reports / f"{role}.job"), **store)

    def end(name: str, process: Process) -> None:
        try:
            assert process.wait(WITHIN_S) == 0, (reports / f"{name}.log").read_text(errors="replace")[-3000:]
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def finish(role: str, process: Process) -> dict[str, dict[str, Any]]:
        end(role, process)
        found: dict[str, dict[str, Any]] = json.loads((reports / f"{role}.json").read_text())
        return found

    end("save", run("save", str(MAKER), str(checkpoints)))
    for runtime_dir in private_store_directory():
        both = {role: begin(role, runtime_dir) for role in ("stock", "publisher")}
        found = {role: finish(role, process) for role, process in both.items()}
        found["reader"] = finish("reader", begin("reader", runtime_dir))
        yield Examined(**found, status=status_of(runtime_dir))


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return an architecture's name, and a dtype."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(params=["publisher", "reader"])
def role(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def stock(examined: Examined, case: tuple[str, str]) -> dict[str, Any]:
    """Return the facts without wooly."""
    return of(examined, "stock", case)


@pytest.fixture
def shared(examined: Examined, role: str, case: tuple[str, str]) -> dict[str, Any]:
    """Return the facts with wooly, from the publisher or the reader."""
    return of(examined, role, case)


def of(examined: Examined, role: str, case: tuple[str, str]) -> dict[str, Any]:
    name, dtype = case
    facts: dict[str, Any] = getattr(examined, role)[name][dtype]
    assert "error" not in facts, f"{role}: {facts['error']}"
    return facts


def test_there_are_many_architectures_of_every_kind():
    """Control: the table covers every kind."""
    assert len({each.name for each in ARCHITECTURES}) == len(ARCHITECTURES) >= 35
    kinds = {"decoder", "experts", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "state-space"}
    assert {each.kind for each in ARCHITECTURES} == kinds


def test_one_published_and_the_other_attached(examined: Examined, case: tuple[str, str]):
    """By the store's counters around the load; neither process fell back."""
    published, attached = (of(examined, role, case)["counted"] for role in ("publisher", "reader"))
    assert (published["publishes"], published["attaches"]) == (1, 1)  # it maps the published model
    assert (attached["publishes"], attached["attaches"]) == (0, 1)
    assert published["fallbacks"] == attached["fallbacks"] == 0


def test_weights_are_shared(shared, stock):
    """All bytes, apart from small tensors, missing and computed ones, and repetitions."""
    missing = stock["info"]["missing_keys"]
    loaded = [facts for name, facts in once(stock, "parameters") if name not in missing]
    distinct = {facts[-1]: nbytes(facts) for facts in loaded}
    large = sum(size for size in distinct.values() if size >= 16384)
    assert 0 < large <= shared["stats"]["shared_bytes"]
    everything = sum(nbytes(facts) for kind in ("parameters", "buffers") for _, facts in once(stock, kind))
    assert shared["stats"]["shared_bytes"] + shared["stats"]["private_bytes"] == everything


def test_outputs_are_bit_equal(shared, stock):
    """Of a forward pass whose outputs depend on the weights."""
    assert stock["varied"]
    assert shared["outputs"] == stock["outputs"]


def test_outputs_are_bit_equal_after_a_swap(shared, stock):
    """The process left, and the next call brought its model back."""
    assert shared["swapped"] == {"state": "swapped", "outputs": stock["outputs"]}


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in GENERATING], ids="-".join, indirect=True)
def test_generated_tokens_are_equal(shared, stock):
    assert shared["tokens"] == stock["tokens"]


def test_parameters_are_equal(shared, stock):
    """Order of names, types, dtypes, shapes, strides, devices (none is meta), ``requires_grad``, and bytes."""
    assert list(shared["parameters"]) == list(stock["parameters"])
    assert shared["parameters"] == stock["parameters"]
    assert all("meta" not in device_of(facts) for facts in shared["parameters"].values())


def test_the_same_parameters_are_one_object(shared, stock):
    """Tied parameters, and no others, although layers with equal bytes are one blob in the store."""
    assert shared["ties"] == stock["ties"]
    assert shared["overlaps"] == shared["ties"]


def test_buffers_and_tensor_attributes_are_equal(shared, stock):
    """Persistent buffers, buffers computed after loading, and tensors outside of registries."""
    assert shared["buffers"] == stock["buffers"]
    assert shared["attributes"] == stock["attributes"]
    assert all("meta" not in device_of(facts) for facts in shared["buffers"].values())


def test_loading_info_is_equal(shared, stock):
    """Missing, unexpected and mismatched keys; the model's dtype; evaluation mode."""
    for what in ("info", "dtype", "training"):
        assert shared[what] == stock[what]


def test_saved_files_are_equal(shared, stock):
    """Keys and tensors, and the bytes of every file."""
    assert shared["saved"]["tensors"] == stock["saved"]["tensors"]
    assert shared["saved"]["files"] == stock["saved"]["files"]


def test_the_store_outlives_both_with_every_model(examined: Examined):
    """No reader is left, no publication was aborted, and equal tensors are resident once."""
    committed = [model for model in examined.status.models if model.state == "committed"]
    assert len(committed) == len(CASES)
    assert not any(model.readers for model in committed)
    assert examined.status.counters.aborted_publishes == 0
    bert = [model for model in committed if "bert-new-head" in model.name]
    assert len(bert) == 2
    assert all(model.unique_bytes < model.bytes // 20 for model in bert)  # the trunk is that of the other BERT


def device_of(facts: list[Any]) -> str:
    device: str = facts[4]
    return device


def nbytes(facts: list[Any]) -> int:
    """Return the bytes of a tensor, by dtype and shape."""
    _, dtype, shape, *_ = facts
    size: int = {"torch.float32": 4, "torch.bfloat16": 2, "torch.int64": 8, "torch.bool": 1}[dtype]
    for extent in shape:
        size *= extent
    return size


def once(facts: dict[str, Any], kind: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield each tensor, under one of its names."""
    again = {name for group in facts["ties"] for name in group[1:]} if kind == "parameters" else set()
    return ((name, described) for name, described in facts[kind].items() if name not in again)
