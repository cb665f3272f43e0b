"""Two tensor parallel engines, compared with stock vLLM: a scenario for CPUs and GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.engines import SHARING, status_of


def ranks_share(engine: Any, path: Path, runtime_dir: Path, **job: Any) -> list[str]:
    """Check that each rank shares with the same rank of the other engine and answers as stock; return the devices."""
    stock = engine(path, **job)
    right = stock.wait("answered")["tokens"]
    assert stock.finish() == 0
    sharing = [engine(path, hold=True, lease=False, **job, **SHARING) for _ in range(2)]
    for process in sharing:
        assert process.wait("answered")["tokens"] == right
    status = status_of(runtime_dir)
    assert [model.readers for model in status.models] == [2, 2]
    assert len({model.key for model in status.models}) == 2
    assert (status.counters.publishes, status.counters.attaches, status.counters.fallbacks) == (2, 4, 0)
    for process in sharing:
        process.tell("go on")
    for process in sharing:
        assert process.wait("answered again")["tokens"] == right
        assert process.finish() == 0
    return [model.device for model in status.models]
