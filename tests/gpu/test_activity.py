"""The status of an engine on a GPU: its GPU by UUID, and its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import BESIDE_OTHERS
from support.engines import SHARING, status_of
from support.waiting import wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(590)]


def test_the_status_names_the_gpu_of_an_engine_and_its_work(
    engine: Any, checkpoint: Any, runtime_dir: Path, gpu: str
) -> None:
    pytest.importorskip("vllm")
    process = engine(checkpoint("llama"), **SHARING, load=True, settings=BESIDE_OTHERS)
    process.wait("answered")

    def reader() -> Any:
        return next(row for row in status_of(runtime_dir).clients if row.role == "reader")

    wait_until(lambda: (row := reader()).activity is not None and row.activity.running > 0, "running requests", 60)
    assert (reader().gpus, reader().kind) == ((gpu,), "vllm")
    process.tell("stop")
    process.wait("worked")
    assert process.finish() == 0
