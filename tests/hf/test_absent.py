"""Registers that stand in for a module's own: every access to a tensor passes first, and names do not."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

from wooly_hf.absent import Absence, AbsentTensors, looking


@pytest.fixture
def passed():
    return []


@pytest.fixture
def absent(passed):
    """Return a register with two values; each pass is recorded in `passed`."""

    @contextlib.contextmanager
    def passing():
        passed.append(1)
        yield

    return AbsentTensors({"a": 1, "b": 2}, passing)


def missing(register):
    with pytest.raises(KeyError) as raised:
        register["c"]
    return raised.value.args


NAMES = {
    "in": lambda it: "a" in it,
    "len": len,
    "iter": list,
    "keys": lambda it: list(it.keys()),
    "reversed": lambda it: list(reversed(it)),
    "bool": bool,
}
ACCESSES = {
    "item": lambda it: it["a"],
    "missing": missing,
    "get": lambda it: [it.get("a"), it.get("c", 3)],
    "items": lambda it: list(it.items()),
    "values": lambda it: list(it.values()),
    "copy": lambda it: it.copy(),
    "set": lambda it: it.__setitem__("a", 5),
    "del": lambda it: it.__delitem__("a"),
    "pop": lambda it: it.pop("a"),
    "popitem": lambda it: it.popitem(),
    "setdefault": lambda it: it.setdefault("c", 7),
    "update": lambda it: it.update(a=5),
    "clear": lambda it: it.clear(),
    "equal": lambda it: it == {"a": 1, "b": 2},
    "unequal": lambda it: it != {"a": 1},
    "or": lambda it: it | {"c": 3},
    "or from the right": lambda it: {"c": 3} | it,
    "update in place": lambda it: it.__ior__({"c": 3}) and None,
    "repr": repr,
    "dict": dict,
    "unpacked": lambda it: {**it},
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "pickled": lambda it: pickle.loads(pickle.dumps(it)),
}


@pytest.mark.parametrize("how", NAMES)
def test_names_are_answered_at_once(absent, passed, how):
    assert NAMES[how](absent) == NAMES[how]({"a": 1, "b": 2})
    assert not passed


@pytest.mark.parametrize("how", ACCESSES)
def test_an_access_passes_and_goes_to_the_modules_own_register(absent, passed, how):
    """The result, its type and what has changed are those of a plain dict."""
    plain = {"a": 1, "b": 2}
    expected = ACCESSES[how](plain)
    found = ACCESSES[how](absent)
    assert passed
    assert found == expected
    assert type(found) is type(expected)
    assert absent.register == plain


def test_every_method_of_a_dict_is_covered():
    """Also those that later versions of Python add."""
    inherited = set(dir(object)) | {"__class_getitem__", "fromkeys", "__init__", "__new__", "__getattribute__"}
    ours = vars(AbsentTensors)
    missing = [name for name in dir(dict) if name not in inherited and name not in ours]
    assert missing == []


def test_looking_does_not_pass(absent, passed):
    with looking():
        assert absent["a"] == 1
        assert list(absent.items()) == [("a", 1), ("b", 2)]
    assert not passed
    assert absent["a"] == 1
    assert passed


def test_modules_have_their_own_registers_again(passed):
    """The same dicts as before; those without an absent tensor are never replaced."""

    @contextlib.contextmanager
    def passing():
        passed.append(1)
        absence.end()
        yield

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = [(it._parameters, it._buffers) for it in model.modules()]
    absence, bias = Absence(passing), model[0].bias
    absence.begin(model.modules(), lambda tensor: tensor is bias)
    assert [type(it._parameters) for it in model.modules()] == [dict, AbsentTensors, dict]
    assert model[1].weight is not None
    assert not passed
    assert model[0].weight.shape == (2, 2)
    assert passed == [1]
    after = [(it._parameters, it._buffers) for it in model.modules()]
    assert all(one is other for pair in zip(before, after, strict=True) for one, other in zip(*pair, strict=True))


def test_a_module_that_is_gone_is_no_matter():
    absence = Absence(contextlib.nullcontext)
    module = torch.nn.Linear(2, 2)
    absence.begin([module], lambda _: True)
    assert len(list(absence.registers())) == 1
    del module
    assert list(absence.registers()) == []
    absence.end()
