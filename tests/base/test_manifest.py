"""Manifests: a round trip preserves them, and untrusted bytes are checked completely."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.content import key

from shared_store.base.errors import ProtocolError
from shared_store.base.manifest import ITEM_SIZES, Blob, Manifest, TensorEntry, decode, encode

BLOBS = st.builds(Blob, st.binary(min_size=32, max_size=32), st.integers(0, 1 << 40))
NAMES = st.text("abc.0", max_size=6)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def entries(draw, blobs):
    """An entry within its blob."""
    index = draw(st.integers(0, len(blobs) - 1))
    dtype = draw(st.sampled_from(sorted(ITEM_SIZES)))
    room = blobs[index].nbytes // ITEM_SIZES[dtype]
    shape = [draw(st.integers(0, 8)) for _ in range(draw(st.integers(0, 3)))]
    stride = [draw(st.integers(0, 16)) for _ in shape]
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else -1
    if reach >= room:
        shape, stride, reach = [0], [1], -1
    offset = draw(st.integers(0, max(0, room - reach - 1)))
    return TensorEntry(
        draw(NAMES),
        draw(NAMES),
        draw(st.sampled_from(["parameter", "buffer", "attribute"])),
        index,
        dtype,
        tuple(shape),
        tuple(stride),
        offset,
        draw(st.integers(0, 9)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def manifests(draw):
    blobs = draw(st.lists(BLOBS, min_size=1, max_size=4))
    return Manifest(
        key=key(1),
        name=draw(NAMES),
        engine=draw(NAMES),
        device="cpu",
        blobs=tuple(blobs),
        tensors=tuple(draw(st.lists(entries(blobs), max_size=4))),
        state=draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
    )


@given(manifests())
def test_round_trip(manifest):
    assert decode(encode(manifest)) == manifest


def reaches(entry):
    """Return the last byte of an entry in its blob, found by visiting all its elements."""
    size, last = ITEM_SIZES[entry.dtype], -1
    positions = [entry.offset]
    for length, step in zip(entry.shape, entry.stride, strict=True):
        positions = [position + index * step for position in positions for index in range(length)]
    return max([last, *(position * size + size - 1 for position in positions)])


@given(manifests())
def test_extent_is_the_end_of_the_last_element(manifest):
    for entry in manifest.tensors:
        assert entry.extent == reaches(entry) + 1


@given(manifests(), st.data())
def test_a_tensor_that_exceeds_its_blob_by_one_byte_is_refused(manifest, data):
    candidates = [entry for entry in manifest.tensors if entry.extent]
    if not candidates:
        return
    entry = data.draw(st.sampled_from(candidates))
    blobs = list(manifest.blobs)
    blobs[entry.blob] = Blob(blobs[entry.blob].digest, entry.extent - 1)
    with pytest.raises(ProtocolError):
        decode(encode(msgspec.structs.replace(manifest, blobs=tuple(blobs))))


GOOD = TensorEntry("layer", "weight", "parameter", 0, "float32", (4, 4), (4, 1), 0, 0)
HOSTILE = {
    "negative offset": {"offset": -1},
    "offset past the end": {"offset": 1},
    "huge offset": {"offset": 2**62},
    "shape too large": {"shape": (5, 4)},
    "huge shape": {"shape": (2**62, 2**62)},
    "negative shape": {"shape": (-4, -4)},
    "negative stride": {"stride": (-4, 1)},
    "stride too large": {"stride": (5, 1)},
    "huge stride": {"stride": (2**63 - 1, 2**63 - 1)},
    "more strides than sizes": {"stride": (4, 1, 1)},
    "too many dimensions": {"shape": (1,) * 33, "stride": (1,) * 33},
    "unknown dtype": {"dtype": "float128"},
    "a wider dtype": {"dtype": "float64"},
    "no such blob": {"blob": 1},
    "negative blob": {"blob": -1},
    "negative alias": {"alias": -1},
    "unknown kind": {"kind": "pointer"},
}


def manifest_with(entry, **changes):
    fields = {"key": key(1), "name": "m", "engine": "e", "device": "cpu", "blobs": (Blob(bytes(32), 64),)}
    return Manifest(**{**fields, "tensors": (entry,), **changes})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused(name):
    """Each differs in one field from a tensor that is accepted."""
    assert decode(encode(manifest_with(GOOD))).tensors == (GOOD,)
    with pytest.raises(ProtocolError):
        decode(encode(manifest_with(msgspec.structs.replace(GOOD, **HOSTILE[name]))))


@pytest.mark.parametrize("blob", [Blob(bytes(31), 64), Blob(b"", 64), Blob(bytes(33), 64), Blob(bytes(32), -1)])
def test_malformed_blobs_are_refused(blob):
    with pytest.raises(ProtocolError):
        decode(encode(manifest_with(GOOD, blobs=(Blob(bytes(32), 64), blob))))


def test_another_schema_is_refused_and_named():
    data = msgspec.msgpack.decode(encode(manifest_with(GOOD)))
    with pytest.raises(ProtocolError, match=r"wooly\.manifest/1"):
        decode(msgspec.msgpack.encode({**data, "schema": "wooly.manifest/2"}))


def test_state_nested_too_deeply_is_refused():
    """Only the state can make a decoder recurse."""
    data = encode(manifest_with(GOOD))
    empty = msgspec.msgpack.encode({"state": {}})[1:]
    assert data.endswith(empty)
    deep = msgspec.msgpack.encode("state") + b"\x81" + msgspec.msgpack.encode("a") + b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(ProtocolError):
        decode(data[: -len(empty)] + deep)


@given(manifests(), st.data())
def test_damaged_manifests_are_refused_or_valid(manifest, data):
    """Truncated anywhere: refused. With one byte changed anywhere: refused, or every tensor is within its blob."""
    raw = bytearray(encode(manifest))
    at = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(ProtocolError):
        decode(bytes(raw[:at]))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(raw))
    except ProtocolError:
        return
    for entry in found.tensors:
        assert entry.extent <= found.blobs[entry.blob].nbytes


@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(ProtocolError):
        decode(data)
