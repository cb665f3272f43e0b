"""A short run of the fuzzer of the protocol. ``python benchmarks fuzz`` runs a long one."""

from __future__ import annotations

import pytest
from support.fuzzing import fuzz


@pytest.mark.parametrize("seed", range(3))
def test_damaged_conversations(seed):
    """Each connection ends without an internal error, and leaves nothing."""
    outcome = fuzz(300, seed)
    assert outcome.executions == 300
    assert outcome.crashes == []
    assert outcome.leaks == 0
    assert outcome.fds > 50
    assert len(outcome.ends) > 3  # they end in more ways than one
