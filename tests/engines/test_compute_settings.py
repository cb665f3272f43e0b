"""Settings of compute reach the store from an engine's options; those that cannot be obeyed end its start."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import SHARING, status_of
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(590)


def test_an_engine_with_its_devices_alone_keeps_others_out(engine: Any, checkpoint: Any, runtime_dir: Any) -> None:
    """The second start ends with the name of the first one, which has its share, and a place in the turns."""
    path = checkpoint("llama")
    options = {"fallback": False, "workload": "chat", "compute_share": 40, "exclusive": True}
    first = engine(path, load_format="wooly", extra=options, hold=True)
    first.wait("answered")

    def gated() -> bool:
        (found,) = status_of(runtime_dir).workloads
        return found.compute is not None and found.compute.gated

    wait_until(gated, "the engine to have an arbiter")
    (chat,) = status_of(runtime_dir).workloads
    assert chat.compute is not None
    assert (chat.name, chat.compute.share, chat.compute.exclusive) == ("chat", 40.0, True)
    second = engine(path, **SHARING)
    assert second.finish() != 0
    log = "\n".join(second.log)
    assert "ExclusiveError" in log
    assert "chat has it alone (GPU_MODE=Exclusive)" in log
    first.tell("go on")
    assert first.finish() == 0


def test_an_engine_on_a_cpu_with_a_cap_under_mps_does_not_start(engine: Any, checkpoint: Any) -> None:
    process = engine(checkpoint("llama"), environment={"WOOLY_MPS_PERCENT": "25"}, **SHARING)
    assert process.finish() != 0
    expected = "WOOLY_MPS_PERCENT=25 caps a workload on GPUs, and this one computes on cpu: unset it"
    assert expected in "\n".join(process.log)
