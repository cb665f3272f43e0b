"""The scratch memory of vLLM's layers in ranges, with vLLM's own manager of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shared_store.memory.fake import FakeBackend
from shared_store.private.ranges import PrivateMemory
from wooly_vllm.residency import workspaces

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what vLLM imports
]

LARGE = ((workspaces.LEAST_BYTES * 2,), torch.uint8)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from vllm.v1.worker import workspace

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM itself does on a CPU
    workspace.init_workspace_manager(torch.device("cpu"))
    yield workspace.current_workspace_manager()
    workspace.reset_workspace_manager()


@pytest.fixture
def memory() -> PrivateMemory:
    return PrivateMemory(FakeBackend())


def test_a_workspace_moves_and_layers_get_its_memory_from_then_on(manager: Any, memory: PrivateMemory) -> None:
    manager.get_simultaneous(LARGE)
    assert workspaces.move_in(memory) == memory.nbytes == workspaces.LEAST_BYTES * 2
    (scratch,) = manager.get_simultaneous(LARGE)
    assert [it.address for it in memory._all()] == [scratch.data_ptr()]
    memory.go_away()
    memory.come_back()
    scratch.fill_(7)
    assert int(scratch[-1]) == 7


def test_a_workspace_that_vllm_replaces_is_freed(manager: Any, memory: PrivateMemory) -> None:
    manager.get_simultaneous(LARGE)
    workspaces.move_in(memory)
    manager.get_simultaneous(((workspaces.LEAST_BYTES * 3,), torch.uint8))
    gc.collect()
    assert memory.nbytes == 0


def test_workspaces_that_engines_of_one_process_share_stay(
    manager: Any, memory: PrivateMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them could leave while another one works."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    manager.get_simultaneous(LARGE)
    assert workspaces.move_in(memory) == 0


@pytest.mark.usefixtures("manager")
def test_without_workspaces_nothing_moves(memory: PrivateMemory) -> None:
    assert workspaces.move_in(memory) == memory.nbytes == 0


def test_small_workspaces_and_those_with_views_stay(manager: Any, memory: PrivateMemory) -> None:
    manager.get_simultaneous(((1024,), torch.uint8))
    assert workspaces.move_in(memory) == 0
    kept = manager.get_simultaneous(LARGE)
    assert workspaces.move_in(memory) == 0
    kept[0].fill_(1)
    assert int(manager.get_simultaneous(LARGE)[0][0]) == 1
