"""Rehearsing a layer: what comes out must be the publisher's in everything that has no values of weights in it."""

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
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # importing vLLM here, in this process, warns
]


class Kernel:
    """What a layer's method might leave: it refers to the layer's weight, and has plain values and helpers."""

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
    """Zeros here, weights there: the manifest has them, and a reader is bound to them."""
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
def test_everything_else_does(here: dict[str, Any], there: dict[str, Any]) -> None:
    """What differs anywhere that the layer's own objects reach is found, and the layer is named."""
    if "packed" in here:  # a tuple hides a module from its parent's registers, as kernels do
        here, there = {"packed": (here["packed"],)}, {"packed": (there["packed"],)}
    published = prints(model(**here))
    same, other = model(**here), model(**there)
    rehearsal.check(same, {"0": same[0]}, published)
    with pytest.raises(BindingError, match="the kernel state of 0 differs from the publisher"):
        rehearsal.check(other, {"0": other[0]}, published)


def test_a_layer_more_or_less_is_a_difference() -> None:
    """A publisher whose layer needed no rehearsal, and a reader whose layer does, are not alike."""
    made = model()
    with pytest.raises(BindingError):
        rehearsal.check(made, {"0": made[0]}, {})
    with pytest.raises(BindingError):
        rehearsal.check(made, {}, prints(made))


def test_what_hides_its_contents_is_never_equal_to_that_of_another_process() -> None:
    """An object of C code may hold weights that were packed: nobody can tell, so it is not shared."""
    hidden = torch.Generator()
    reading = rehearsal._Reading(rehearsal._Known(set(), set()))
    assert any("hides its contents, process" in line for line in reading.lines("", {"handle": hidden}))
    # Not even the same object is equal to itself: processes in containers may have the same number.
    assert prints(model(handle=hidden)) != prints(model(handle=hidden))


class Private:
    """Keeps what it was given under names that are easily overlooked."""

    __slots__ = "__kept"  # noqa: PLC0205 - one name, not in a tuple

    def __init__(self, kept: Any) -> None:
        self.__kept = kept


@pytest.mark.parametrize("wrap", [Private, lambda tensor: types.MethodType(closing_over(tensor), "bound to")])
def test_tensors_in_out_of_the_way_places_count(wrap: Any) -> None:
    """In private slots, in closures of bound methods."""
    assert prints(model(call=wrap(torch.zeros(2)))) == prints(model(call=wrap(torch.zeros(2))))
    assert prints(model(call=wrap(torch.zeros(2)))) != prints(model(call=wrap(torch.ones(2))))


def test_every_one_of_many_closures_counts() -> None:
    """What is made on the way through one of them must not stand for what is in the next."""
    calls = [closing_over(torch.zeros(2)) for _ in range(50)]
    published = prints(model(calls=calls))
    for number in range(50):
        changed = [closing_over(torch.ones(2)) if index == number else call for index, call in enumerate(calls)]
        assert prints(model(calls=changed)) != published
