"""The loader's options, and the plain state in manifests."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from shared_store.base.errors import BindingError, ConfigError
from wooly_vllm.loading.state import changes, plain_state, restore
from wooly_vllm.options import CHECKPOINT_FORMATS, Options, parse

VALID = {
    "mode": "load",
    "inner_load_format": "safetensors",
    "fallback": False,
    "restore_from": "/tmp/saved",
    "runtime_dir": "/tmp/somewhere",
    "timeout_s": 12.5,
    "share_min_bytes": 1,
    "unproven": True,
    "swap": False,
    "priority": 3,
    "workload": "chat",
    "compute_share": 12.5,
    "exclusive": True,
}
PATHS = ("restore_from", "runtime_dir")


def test_every_key_is_read():
    """Each option alone, and all together; the table above is complete."""
    assert set(VALID) == set(Options.__dataclass_fields__)
    for name, value in VALID.items():
        expected = Path(value) if name in PATHS else value
        options = parse({name: value})
        assert getattr(options, name) == expected
        assert {other: getattr(options, other) for other in VALID if other != name} == {
            other: getattr(Options(), other) for other in VALID if other != name
        }
    assert parse(json.loads(json.dumps(VALID))) == Options(**{**VALID, **{name: Path(VALID[name]) for name in PATHS}})


@pytest.mark.parametrize("empty", [None, {}, ""])
def test_an_empty_config_gives_the_defaults(empty):
    assert parse(empty) == Options()


def test_values_in_another_json_form():
    """A whole number of seconds, an unset directory, a home directory."""
    assert parse({"timeout_s": 5}).timeout_s == 5.0
    assert parse({"runtime_dir": None}).runtime_dir is None
    assert parse({"runtime_dir": "~/x"}).runtime_dir == Path.home() / "x"
    for name in CHECKPOINT_FORMATS:
        assert parse({"inner_load_format": name}).inner_load_format == name


def test_an_unknown_key_lists_the_valid_ones():
    with pytest.raises(ConfigError) as caught:
        parse({"mode": "auto", "shared_min_bytes": 1, "colour": 2})
    assert "unknown key colour, shared_min_bytes" in str(caught.value)
    for name in VALID:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "store"},
        {"mode": 1},
        {"inner_load_format": "dummy"},
        {"inner_load_format": "wooly"},
        {"inner_load_format": None},
        {"fallback": "no"},
        {"fallback": 0},
        {"runtime_dir": 5},
        {"runtime_dir": ["/tmp"]},
        {"timeout_s": "1"},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"timeout_s": 1e12},
        {"share_min_bytes": 0},
        {"share_min_bytes": 1.5},
        {"share_min_bytes": True},
        {"swap": "no"},
        {"swap": 0},
        {"priority": 5},
        {"priority": -1},
        {"priority": True},
        {"priority": "high"},
        {"workload": 3},
        {"compute_share": 0.5},
        {"compute_share": 101},
        {"compute_share": "25%"},
        {"compute_share": float("nan")},
        {"exclusive": "yes"},
        {"exclusive": 1},
    ],
    ids=str,
)
def test_a_wrong_value_names_its_key(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        parse(wrong)


@pytest.mark.parametrize("extra", ["mode=load", ["mode"], 5])
def test_a_config_that_is_not_an_object(extra):
    with pytest.raises(ConfigError, match="JSON object; valid keys: mode, "):
        parse(extra)


@pytest.mark.parametrize(
    ("given", "falls_back"),
    [({}, True), ({"fallback": False}, False), ({"mode": "save"}, False), ({"mode": "load", "fallback": True}, False)],
)
def test_modes_that_fall_back(given, falls_back):
    """Only `auto` may load a private copy."""
    assert parse(given).falls_back is falls_back


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.flag, self.count, self.ratio, self.name, self.unset = False, 1, 0.5, "stock", None
        self.shape = (1, 2)
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("scale", torch.ones(2))

    def load(self):
        self.flag, self.count, self.ratio, self.name, self.unset = True, 2, 0.25, "packed", 7
        self.weight = None
        self.scale = None
        self.added = "new"


def model():
    return nn.Sequential(Layer(), nn.Sequential(Layer()))


def test_changes_are_restored():
    """Attributes that loading set on a module are set on the same module of another model, and no others."""
    publisher, reader = model(), model()
    before = plain_state(publisher)
    publisher[1][0].load()
    found = changes(before, plain_state(publisher))
    assert set(found) == {"1.0"}
    restore(reader, json.loads(json.dumps(found)))
    restore(reader, found)
    assert plain_state(reader) == plain_state(publisher)
    assert reader[1][0].weight is None
    assert reader[1][0].scale is None
    assert reader[1][0].added == "new"
    assert reader[0].weight is not None
    assert reader[0].name == "stock"


def test_nothing_changed():
    """`training` is set by the engine, and is not part of the state."""
    publisher = model()
    before = plain_state(publisher)
    publisher.eval()
    assert changes(before, plain_state(publisher)) == {}


def test_equal_values_of_different_types_differ():
    """1, 1.0 and True are equal in Python, and different for a kernel."""
    publisher = model()
    before = plain_state(publisher)
    publisher[0].count = True
    assert changes(before, plain_state(publisher)) == {"0": {"count": True}}


def test_state_of_a_missing_module():
    with pytest.raises(BindingError, match=r"no module '1\.0'"):
        restore(nn.Sequential(Layer()), {"1.0": {"flag": True}})
