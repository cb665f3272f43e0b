"""Tensors that no module names must not differ between a publisher and its readers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wooly_vllm.loading.state import Unnamed


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.views = [self.weight.data[:2]]
        self.scales = {"k": torch.ones(3)}
        self.kernel = SimpleNamespace(slopes=torch.arange(8, dtype=torch.bfloat16), empty=torch.empty(0))


def test_unchanged_and_named_tensors_do_not_count():
    model = Model()
    unnamed = Unnamed(model)
    model.weight.data.fill_(7)  # seen through the view in the list as well
    model.other = nn.Parameter(torch.zeros(2))
    assert unnamed.changed(model) == []


@pytest.mark.parametrize(
    ("load", "path"),
    [
        (lambda model: model.scales["k"].fill_(2), "scales['k']"),
        (lambda model: model.kernel.slopes.data.mul_(2), "kernel.slopes"),
        (lambda model: model.scales.update(v=torch.ones(1)), "scales['v']"),
        (lambda model: model.scales.update(k=torch.zeros(3)), "scales['k']"),
        (lambda model: setattr(model.kernel, "slopes", torch.arange(8)), "kernel.slopes"),
    ],
)
def test_changed_and_new_tensors_are_reported_by_path(load, path):
    model = Model()
    unnamed = Unnamed(model)
    load(model)
    assert unnamed.changed(model) == [path]
