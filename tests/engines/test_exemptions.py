"""Why engines are never held for others: ranks that wait for each other, and devices that are not known."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def exemptions() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        from wooly_vllm.residency import exemptions
    return exemptions


def configured(**changes: Any) -> Any:
    """Return the parts of a configuration that matter, of an engine on one CPU."""
    parallel = {"data_parallel_size": 1, "nnodes": 1, "distributed_executor_backend": "uni"}
    parallel |= {key: changes.pop(key) for key in parallel if key in changes}
    given = {
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        "device_config": SimpleNamespace(device="cpu"),
        **changes,
    }
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **given)


def test_an_ordinary_engine_may_be_held(exemptions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exemptions.by_configuration(configured()) == ""
    assert exemptions.by_configuration(configured(distributed_executor_backend="mp")) == ""
    for world in ("", "1", "many"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
        assert exemptions.by_process() == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distributed_executor_backend": "external_launcher"}, "external launcher"),
        ({"data_parallel_size": 2}, "data parallel ranks wait for each other"),
        ({"nnodes": 2}, "workers on other nodes"),
        ({"kv_transfer_config": object()}, "other engines may wait"),
        ({"ec_transfer_config": object()}, "other engines may wait"),
        ({"device_config": SimpleNamespace(device="cuda")}, "on CPUs only"),
    ],
)
def test_reasons_in_a_configuration(exemptions: Any, changes: dict[str, Any], reason: str) -> None:
    assert reason in exemptions.by_configuration(configured(**changes))


def test_ranks_that_a_launcher_started_are_never_held(exemptions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "one of 4 ranks" in exemptions.by_process()


def test_ranks_of_a_process_group_are_never_held(tmp_path: Path) -> None:
    """Two real processes of one group, without a launcher's variables."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)\n"
        "from wooly_vllm.residency import exemptions\n"
        "print('reason:', exemptions.by_process())\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    variables = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), f"file://{tmp_path}/group", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all("reason: its process is one of 2 ranks of torch.distributed" in it for it in said)
