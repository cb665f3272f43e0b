"""Rehearsing a layer: its state must equal the publisher's in everything but the values of weights."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from shared_store.base.errors import BindingError
from wooly_vllm.loading import rehearsal

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # importing vLLM in this process warns
]


class Kernel:
    """State that a layer's method may leave: a reference to the layer's weight, plain values and helpers."""

    def __init__(self, weight: torch.Tensor, **other: Any) -> None:
        self.weight = weight
        self.group_size = 128
        vars(self).update(other)


class Slotted:
    __slots__ = ("rows",)

    def __init__(self, rows: int) -> None:
        self.rows = rows


def model(values: float = 0.0, **other: Any) -> nn.Module:
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data.fill_(values)
    layer.kernel = Kernel(layer.weight, **other)
    return nn.Sequential(layer)


def prints(made: nn.Module) -> dict[str, str]:
    return rehearsal.fingerprints(made, {"0": made[0]})


def closing_over(thing: Any) -> Any:
    return lambda x: x if thing is None else thing


def test_the_values_of_the_models_own_weights_do_not_count() -> None:
    """They come from the manifest, to whose tensors a reader is bound."""
    assert prints(model(0.0)) == prints(model(1.5))


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"is_k_full": True}, {"is_k_full": False}),
        ({"workspace": torch.zeros(4)}, {"workspace": torch.ones(4)}),
        ({"scale": [1.0, {"a": 2.0}]}, {"scale": [1.0, {"a": 3.0}]}),
        ({"call": closing_over(torch.zeros(2))}, {"call": closing_over(torch.ones(2))}),
        ({"call": functools.partial(max, 1)}, {"call": functools.partial(max, 2)}),
        ({"packed": nn.Linear(2, 2)}, {"packed": nn.Linear(2, 2)}),
        ({"slotted": Slotted(1)}, {"slotted": Slotted(2)}),
    ],
    ids=["plain", "tensor", "nested", "closure", "partial", "module outside of the model", "slots"],
)
def test_all_other_state_counts(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Any difference reachable from the layer's own objects raises an error that names the layer."""
    if "packed" in here:  # a tuple hides a module from its parent's registries, as in kernels
        here, there = {"packed": (here["packed"],)}, {"packed": (there["packed"],)}
    published = prints(model(**here))
    same, other = model(**here), model(**there)
    rehearsal.check(same, {"0": same[0]}, published)
    with pytest.raises(BindingError, match="the kernel state of 0 differs from the publisher"):
        rehearsal.check(other, {"0": other[0]}, published)


def test_a_missing_or_additional_layer_is_a_difference() -> None:
    """A rehearsal in the reader alone, or in the publisher alone, is a difference."""
    made = model()
    with pytest.raises(BindingError):
        rehearsal.check(made, {"0": made[0]}, {})
    with pytest.raises(BindingError):
        rehearsal.check(made, {}, prints(made))


def test_opaque_objects_are_never_equal() -> None:
    """An object of C code may contain packed weights, which cannot be compared: it is not shared."""
    hidden = torch.Generator()
    reading = rehearsal._Reading(rehearsal._Known(set(), set()))
    assert any("hides its contents, process" in line for line in reading.lines("", {"handle": hidden}))
    # Not even the same object is equal to itself: processes in different containers may have the same pid.
    assert prints(model(handle=hidden)) != prints(model(handle=hidden))


class Private:
    """Stores its argument in a private slot."""

    __slots__ = "__kept"  # noqa: PLC0205 - one name, not in a tuple

    def __init__(self, kept: Any) -> None:
        self.__kept = kept


@pytest.mark.parametrize("wrap", [Private, lambda tensor: types.MethodType(closing_over(tensor), "bound to")])
def test_tensors_in_slots_and_closures_count(wrap: Any) -> None:
    """Tensors in private slots and in closures of bound methods."""
    assert prints(model(call=wrap(torch.zeros(2)))) == prints(model(call=wrap(torch.zeros(2))))
    assert prints(model(call=wrap(torch.zeros(2)))) != prints(model(call=wrap(torch.ones(2))))


def test_every_one_of_many_closures_counts() -> None:
    """Objects made while one closure is read must not stand for those of the next."""
    calls = [closing_over(torch.zeros(2)) for _ in range(50)]
    published = prints(model(calls=calls))
    for number in range(50):
        changed = [closing_over(torch.ones(2)) if index == number else call for index, call in enumerate(calls)]
        assert prints(model(calls=changed)) != published
