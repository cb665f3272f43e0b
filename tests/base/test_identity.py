"""Weight keys and checkpoint digests: equal for equal facts, different for any difference."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.content import key

from shared_store.base.checkpoint import checkpoint_digest, file_id, hash_files
from shared_store.base.digest import digest
from shared_store.base.errors import CheckpointError, UnsupportedError
from shared_store.base.keys import KEY_LENGTH, canonical, is_key, weight_key

NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63), st.floats(), st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
FACTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
)
DICTIONARIES = st.dictionaries(st.text(max_size=6), FACTS, min_size=1, max_size=6)


def reordered(value):
    """Return the same facts with every dictionary in reverse order."""
    if isinstance(value, dict):
        return {name: reordered(inner) for name, inner in reversed(list(value.items()))}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


def same(one, other):
    """True if two facts are equal: of the same type, and NaN equals itself."""
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(DICTIONARIES)
def test_order_does_not_matter(facts):
    assert canonical(facts) == canonical(reordered(facts))
    assert weight_key(b"c", facts) == weight_key(b"c", reordered(copy.deepcopy(facts)))


@given(FACTS, FACTS)
def test_different_facts_are_different_bytes(one, other):
    """`1`, `1.0`, `"1"`, `true`; `null`, `NaN`, `Infinity`; `[]`, `{}`: all of them differ."""
    assert (canonical(one) == canonical(other)) is same(one, other)


@given(DICTIONARIES, st.data())
def test_every_fact_counts(facts, data):
    name = data.draw(st.sampled_from(sorted(facts)))
    value = data.draw(FACTS)
    assume(not same(value, facts[name]))
    assert weight_key(b"c", facts) != weight_key(b"c", {**facts, name: value})
    assert weight_key(b"c", facts) != weight_key(b"c", {found: facts[found] for found in facts if found != name})


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_the_checkpoint_counts(one, other):
    assert (weight_key(one, {}) == weight_key(other, {})) is (one == other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_json_form_differ_from_none(value):
    """Configurations have them (`time_step_limit`), and `None` has another meaning there."""
    assert canonical({"limit": value}) != canonical({"limit": None})


def test_values_without_a_json_form_are_refused():
    for value in (object(), {"layers": object()}, [lambda: 0], 1j):
        with pytest.raises(UnsupportedError, match="no canonical JSON form"):
            canonical(value)


def test_facts_that_contain_themselves_are_refused():
    facts = {}
    facts["self"] = facts
    with pytest.raises(UnsupportedError):
        canonical(facts)


@given(DICTIONARIES)
def test_a_weight_key_is_a_key(facts):
    assert is_key(weight_key(b"c", facts))


@given(st.text(max_size=70))
def test_only_64_hexadecimal_digits_are_a_key(text):
    assert is_key(text) is (len(text) == KEY_LENGTH and all(letter in "0123456789abcdef" for letter in text))
    assert is_key(key(7))
    assert not is_key(key(7) + text[:1]) or text == ""


FILES = st.dictionaries(st.text(min_size=1, max_size=8), st.binary(max_size=64), min_size=1, max_size=6)


def of(files):
    return checkpoint_digest([(name, digest(data)) for name, data in files.items()])


@given(FILES)
def test_a_checkpoint_is_the_same_in_any_order(files):
    pairs = [(name, digest(data)) for name, data in files.items()]
    assert checkpoint_digest(pairs) == checkpoint_digest(pairs[::-1])


@given(FILES, st.data())
def test_one_flipped_byte_is_another_checkpoint(files, data):
    name = data.draw(st.sampled_from(sorted(files)))
    assume(files[name])
    at = data.draw(st.integers(0, len(files[name]) - 1))
    flipped = bytearray(files[name])
    flipped[at] ^= data.draw(st.integers(1, 255))
    assert of(files) != of({**files, name: bytes(flipped)})


@given(FILES, st.text(min_size=1, max_size=8), st.data())
def test_a_renamed_file_is_another_checkpoint(files, new, data):
    name = data.draw(st.sampled_from(sorted(files)))
    assume(new not in files)
    renamed = {(new if found == name else found): content for found, content in files.items()}
    assert of(files) != of(renamed)


@given(FILES, st.text(min_size=1, max_size=8), st.binary(max_size=8))
def test_one_more_file_is_another_checkpoint(files, name, data):
    assume(name not in files)
    assert of(files) != of({**files, name: data})


def test_a_checkpoint_without_files_is_refused():
    with pytest.raises(CheckpointError, match="no weight files"):
        checkpoint_digest([])


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=5), st.integers(1, 4))
def test_files_are_hashed_as_the_digest_of_their_bytes(tmp_path_factory, contents, threads):
    """In their order, for any number of threads. The progress adds up to all bytes."""
    directory = tmp_path_factory.mktemp("files")
    paths = [directory / str(index) for index in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    done = []
    hashed = hash_files(paths, threads=threads, progress=done.append)
    assert [found.digest for found in hashed] == [digest(data) for data in contents]
    assert [found.file for found in hashed] == [file_id(path) for path in paths]
    assert not any(found.settled for found in hashed)  # written a moment ago
    assert sum(done) == sum(map(len, contents))
