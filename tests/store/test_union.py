"""The union of models' blobs, updated step by step, equals a count of all blobs."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.content import key, manifest_of

from shared_store.base.manifest import Blob
from shared_store.store.state.blob_union import BlobUnion

POOL = [Blob(bytes([number]) * 32, nbytes) for number, nbytes in enumerate((0, 1, 10, 100, 1000, 10_000))]
MODELS = st.lists(st.integers(0, len(POOL) - 1), max_size=8)
STEPS = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.sampled_from(["cpu", "gpu"]), MODELS)), max_size=8
)


def counted(models):
    """Bytes of one copy of each blob, and of each model's own blobs."""
    named = Counter((scope, blob) for scope, chosen in models.values() for blob in set(chosen))
    nbytes = sum(POOL[blob].nbytes for _, blob in named)
    unique = {
        name: sum(POOL[blob].nbytes for blob in set(chosen) if named[scope, blob] == 1)
        for name, (scope, chosen) in models.items()
    }
    return nbytes, unique


@given(STEPS)
def test_any_sequence_of_sets_of_models(steps):
    """Models are added, removed, and replaced by others of the same name."""
    union, made = BlobUnion(), {}
    for models in steps:
        for name, (scope, chosen) in models.items():
            if made.get(name, (None,))[0] != (scope, chosen):  # the same model is the same object, as in the store
                made[name] = ((scope, chosen), manifest_of(key(1), [POOL[blob] for blob in chosen]))
        union.update({name: (scope, made[name][1]) for name, (scope, _) in models.items()})
        nbytes, unique = counted(models)
        assert union.nbytes == nbytes
        assert {name: union.unique_bytes(name) for name in "abcd"} == {name: unique.get(name, 0) for name in "abcd"}
    union.update({})
    assert (union.nbytes, union) == (0, BlobUnion())
