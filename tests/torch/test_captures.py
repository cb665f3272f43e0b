"""Torch's graph captures are recorded, so that nothing waits for a device meanwhile."""

from __future__ import annotations

import pytest
import torch

from shared_store.memory.unmapping import captures as recorded
from shared_store.torch import captures


@pytest.fixture
def graph():
    """A graph of a class that records its captures, as torch's does once a GPU's memory is mapped."""

    class Graph:
        fails = ""

        def capture_begin(self, pool=None, *, capture_error_mode="global"):
            assert recorded.active  # before the capture begins
            if self.fails == "begin":
                raise RuntimeError
            return pool, capture_error_mode

        def capture_end(self):
            assert recorded.active
            if self.fails == "end":
                raise RuntimeError

    captures.watch(Graph)
    captures.watch(Graph)
    return Graph()


def test_a_capture_is_recorded_from_before_its_beginning_to_after_its_end(graph):
    assert graph.capture_begin("pool", capture_error_mode="relaxed") == ("pool", "relaxed")
    assert recorded.active
    graph.capture_end()
    assert not recorded.active


@pytest.mark.parametrize("where", ["begin", "end"])
def test_a_capture_that_fails_is_over(graph, where):
    graph.fails = where
    with pytest.raises(RuntimeError):
        graph.capture_begin() and graph.capture_end()
    assert not recorded.active


def test_a_second_watch_wraps_nothing_again(graph):
    assert not hasattr(type(graph).capture_begin.__wrapped__, "__wrapped__")


def test_torch_has_the_methods_that_are_wrapped():
    """Every capture of torch, its compiler and vLLM goes through them."""
    captures.watch()
    assert torch.cuda.CUDAGraph.capture_begin.wooly
    assert torch.cuda.CUDAGraph.capture_end.__wrapped__.__qualname__ == "CUDAGraph.capture_end"
