"""Random trees of modules, with ties, views, dtypes and layouts: bound tensors equal published ones bitwise."""

import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.content import key
from support.programs import start_program
from support.random_modules import Random, described, fill, named
from support.stores import StoreProcess
from support.torch_models import MIN_BYTES, made_dtypes, publish_model, read_model

from shared_store.client.session import Session

NUMBERS = itertools.count(1000)
SIZES = (0, 1, 3, 16, 60)

tensors = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["parameter", "buffer", "transient", "attribute"]),
        "dtype": st.sampled_from(made_dtypes()),
        "shape": st.lists(st.sampled_from(SIZES), max_size=3),
        "layout": st.sampled_from(["plain", "plain", "turned", "every second", "expanded", "offset"]),
        "values": st.integers(0, 2),  # few, so that some tensors are equal
        "same": st.sampled_from(["none", "none", "none", "object", "storage"]),  # as the tensor before it
    }
)
modules = st.recursive(
    st.fixed_dictionaries({"tensors": st.lists(tensors, max_size=4), "children": st.just([])}),
    lambda inner: st.fixed_dictionaries(
        {"tensors": st.lists(tensors, max_size=3), "children": st.lists(inner, max_size=3), "alias": st.booleans()}
    ),
    max_leaves=6,
)


def has_content(spec):
    """Return True if there is a byte to share. The shape is not enough: storage may be that of an empty tensor."""
    return any(tensor.numel() for _, _, tensor in named(Random(spec)))


@pytest.fixture(scope="module")
def runtime():
    """One store for all examples."""
    with tempfile.TemporaryDirectory(prefix="wooly-") as directory:
        store = StoreProcess(directory, redis_url=f"unix://{directory}/away").start()
        yield Path(directory)
        store.clean_up()


def check_round_trip(runtime, spec, model_key):
    model = Random(spec)
    fill(model, spec)
    expected = described(model)
    with Session.connect(runtime, autostart=False) as session:
        publish_model(session, model, model_key, min_bytes=MIN_BYTES)
        assert described(model) == expected
        with Session.connect(runtime, autostart=False) as other:
            reader, _ = read_model(other, lambda: Random(spec), model_key)
            assert described(reader) == expected
    return expected


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(spec=modules.filter(has_content))
def test_any_model_in_one_process(runtime, spec):
    """Publisher and reader have every tensor of the original, with the same objects and storages in common."""
    check_round_trip(runtime, spec, key(next(NUMBERS)))


ELSEWHERE = """
import json, sys
from pathlib import Path
from support.random_modules import Random, described
from support.torch_models import read_model
from shared_store.client.session import Session
specs = json.load(sys.stdin)
with Session.connect(Path(sys.argv[1]), autostart=False) as session:
    print(json.dumps([described(read_model(session, lambda: Random(spec), key)[0]) for key, spec in specs]))
"""


def test_any_model_in_another_process(runtime):
    """The same in other processes, which share only the store; a few at once."""
    specs = []

    @settings(max_examples=8, database=None, deadline=None, derandomize=True)
    @given(spec=modules.filter(has_content))
    def choose(spec):
        specs.append(spec)

    choose()
    models, expected = [], []
    with Session.connect(runtime, autostart=False) as session:
        for number, spec in enumerate(specs):
            model = Random(spec)
            fill(model, spec)
            expected.append(described(model))
            publish_model(session, model, key(number), min_bytes=MIN_BYTES)
            models.append(model)
        process = start_program(ELSEWHERE, runtime, stdin=subprocess.PIPE)
        out, err = process.communicate(json.dumps([(key(n), spec) for n, spec in enumerate(specs)]), timeout=90)
    assert process.returncode == 0, err
    assert json.loads(out) == expected
