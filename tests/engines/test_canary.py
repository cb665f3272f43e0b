"""The canary finds what an engine writes to after loading, and finds nothing in a model that is only read."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from support.engines import CPU_SETTINGS, PRELOADED
from support.preloaded import finish
from torch import nn

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # importing vLLM here, in this process, warns
]


class Model(nn.Module):
    """A weight, a view of it elsewhere, and tensors that no register names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 128), requires_grad=False)
        self.register_buffer("counter", torch.zeros(1))
        self.elsewhere = {"table": torch.ones(8192), "half": self.weight[:32]}


def test_every_written_tensor_is_named_once_and_whether_it_would_be_shared() -> None:
    """Large and small, in registers and outside of them; a tensor of the same memory is not a second one."""
    from wooly_vllm.canary import Watch

    model = Model()
    watch = Watch(model)
    assert len(watch) == 3
    assert watch.written() == []
    model.weight[3, 5] = 7
    model.counter += 1
    model.elsewhere["table"][8191] = 0
    found = {one.path: one.would_be_shared for one in watch.written()}
    assert found == {"weight": True, "counter": False, "elsewhere['table']": True}


def test_a_model_that_is_replaced_and_not_written_to_is_quiet() -> None:
    """New memory in the place of old is no write: the engine does not touch what would be shared."""
    from wooly_vllm.canary import Watch

    model = Model()
    watch = Watch(model)
    model.weight = nn.Parameter(torch.zeros(64, 128), requires_grad=False)
    assert watch.written() == []


def test_the_command_reports_on_a_real_engine(checkpoint: Any) -> None:
    """Nothing of a dense model is written to after loading; the exit code says so, and so does the JSON."""
    settings = {"max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True, "dtype": "bfloat16"}
    command = ["wooly_vllm.canary", str(checkpoint("llama")), "--json", "--engine-args", json.dumps(settings)]
    environment = {**os.environ, **CPU_SETTINGS, "VLLM_CPU_KVCACHE_SPACE": "1"}
    code, output = finish(PRELOADED.start(*command, environment=environment), 280)
    assert code == 0, output
    (line,) = (line for line in output.splitlines() if line.startswith("{"))
    report = json.loads(line)
    assert report["written"] == []
    assert report["watched"] > 10
