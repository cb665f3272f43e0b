"""Saved models: restored with the same manifest and bytes, and readable by other safetensors readers."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from base.test_manifest import JSON, NAMES, entries
from disk.conftest import CONTENTS, MANIFEST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.content import blob, content, key, manifest_of
from support.saved import publish, resident
from support.waiting import wait_until

from shared_store.base.manifest import ITEM_SIZES, Manifest
from shared_store.disk.restore import restore_resident
from shared_store.disk.save import save_resident
from shared_store.disk.saved import SavedModel
from shared_store.transfer.resident import committed

NUMBERS = itertools.count(1000)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def save_in_process(session, model_key, target, shard_bytes):
    save_resident(session, committed(session.status().models, model_key), target, shard_bytes=shard_bytes)


def restore_in_process(session, target):
    with SavedModel(target) as saved:
        return restore_resident(session, saved, "cpu")


@st.composite
def models(draw):
    """Draw a manifest with views, ties and equal blobs, and the bytes of its blobs."""
    contents = draw(st.lists(st.binary(max_size=64) | st.sampled_from([b"same" * 8]), min_size=1, max_size=5))
    blobs = [blob(data) for data in contents]
    manifest = Manifest(
        key=key(next(NUMBERS)),
        name=draw(NAMES),
        engine="test",
        device="cpu",
        blobs=tuple(blobs),
        tensors=tuple(draw(st.lists(entries(blobs), max_size=6))),
        state=draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3)),
    )
    return manifest, contents


@SETTINGS
@given(model=models(), shard_bytes=st.sampled_from([1, 50, 1 << 30]))
def test_any_model_is_restored_byte_for_byte(session, model, shard_bytes):
    """With tensors of any form, in one file or several."""
    manifest, contents = model
    publish(session, manifest, contents)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "saved"
        save_in_process(session, manifest.key, target, shard_bytes)
        session.remove(manifest.key)
        assert restore_in_process(session, target).result == "restored"
    assert resident(session, manifest.key) == (manifest, contents)
    session.remove(manifest.key)


@SETTINGS
@given(model=models(), shard_bytes=st.sampled_from([1, 50, 1 << 30]))
def test_safetensors_readers_find_contiguous_tensors_by_name(session, model, shard_bytes):
    """The safetensors library opens each file, and each distinct blob is stored once."""
    manifest, contents = model
    publish(session, manifest, contents)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "saved"
        save_in_process(session, manifest.key, target, shard_bytes)
        session.remove(manifest.key)
        for file in target.glob("*.safetensors"):
            with safe_open(file, "np"):  # the library's own checks: no gaps, no overlaps, sizes and dtypes that fit
                found |= raw_tensors(file)
    assert sorted(data for _, _, data in found.values()) == sorted(set(contents))
    for entry in manifest.tensors:
        if is_all_of(entry, contents[entry.blob]):
            names = {other.path for other in manifest.tensors if contents[other.blob] == contents[entry.blob]}
            assert any(data == contents[entry.blob] for name in names & found.keys() for _, _, data in [found[name]])


def is_all_of(entry, data):
    """Return whether a tensor has all bytes of its blob in order, and a dtype of every safetensors version."""
    size = ITEM_SIZES[entry.dtype]
    common = entry.dtype in {"float32", "float16", "bfloat16", "int64", "uint8", "bool"}
    strides = [size * step for step in entry.stride]
    array = np.ndarray(entry.shape, f"V{size}", bytes(max(len(data), 1) + 64 * 1024), strides=strides)
    return common and array.flags.c_contiguous and array.nbytes == len(data) and not entry.offset


def raw_tensors(file):
    """Read dtype, shape and bytes of each tensor, following the format's specification."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {
        name: (entry["dtype"], entry["shape"], data[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def test_names_dtypes_and_shapes(session, wooly, tmp_path):
    """A plain tensor by its name, a tied name as an alias, a transposed tensor as bytes."""
    data = [content(1, 64), content(2, 48)]
    manifest = manifest_of(key(1), [blob(one) for one in data])
    whole, transposed = manifest.tensors
    tensors = (
        msgspec.structs.replace(whole, dtype="float32", shape=(2, 8), stride=(8, 1)),
        msgspec.structs.replace(whole, module="head", dtype="float32", shape=(2, 8), stride=(8, 1)),
        msgspec.structs.replace(transposed, dtype="float32", shape=(3, 4), stride=(1, 3)),
    )
    publish(session, msgspec.structs.replace(manifest, tensors=tensors), data)
    assert wooly("save", key(1), "--to", tmp_path / "saved").returncode == 0
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
        assert file.get_tensor("layers.0.weight").tobytes() == data[0]
        assert file.get_tensor("layers.0.weight").shape == (2, 8)
        assert file.get_tensor("layers.1.weight#bytes").tobytes() == data[1]
        assert len(list(file.keys())) == 2
        assert json.loads(file.metadata()["wooly.aliases"]) == {"head.weight": "layers.0.weight"}


def test_only_blobs_that_the_store_lacks_are_read(saved, session, store, wooly):
    """Blobs of another model are shared with it, and not read from disk."""
    client = store.client()
    client.publish(key(8), [[1, 3 << 20], [2, 1000]])
    done = json.loads(wooly("restore", saved, "--json").stdout)
    assert (done["result"], done["bytes_read"]) == ("restored", 5 << 20)
    unique = {one.key: one.unique_bytes for one in session.status().models}
    assert unique == {key(8): 0, MANIFEST.key: 5 << 20}


def test_restoring_a_resident_model_does_nothing(wooly, model, tmp_path):
    """Exit code 0, and nothing is read."""
    assert wooly("save", model.key, "--to", tmp_path / "saved").returncode == 0
    done = wooly("restore", tmp_path / "saved", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["result"], found["bytes_read"]) == ("resident", 0)
    assert "in the store already" in wooly("restore", tmp_path / "saved").stdout


def test_two_restores_at_once(saved, wooly, session):
    """One reads, the other waits for it; both succeed."""
    processes = [wooly.start("restore", saved, "--json") for _ in range(2)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(result["result"] for result in results) == ["resident", "restored"]
    assert session.status().counters.publishes == 1
    assert resident(session, MANIFEST.key) == (MANIFEST, CONTENTS)


def test_a_directory_is_never_replaced(wooly, model, tmp_path):
    """Not a directory with content, a file or a link; an empty directory is accepted."""
    full, file, link, empty = (tmp_path / name for name in ("full", "file", "link", "empty"))
    full.mkdir()
    (full / "other").write_text("other")
    file.write_text("other")
    empty.mkdir()
    link.symlink_to(empty)
    for target in (full, file, link):
        done = wooly("save", model.key, "--to", target)
        assert (done.returncode, done.stdout) == (2, "")
        assert "exists already" in done.stderr
    assert [path.name for path in full.iterdir()] == ["other"]
    assert wooly("save", model.key, "--to", empty).returncode == 0
    assert wooly("save", model.key, "--to", tmp_path / "no" / "parent").returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link"]


def steady_fds(store):
    """Count the open files of the store, without the socket with which it tries to reach its catalog."""
    return min(store.open_fds() for _ in range(200))


def test_saving_and_restoring_leave_nothing_open(saved, wooly, session, store):
    """No reader, no descriptor and no publication."""
    wait_until(lambda: len(session.status().clients) == 1, "the saving client to end")
    before = steady_fds(store)
    assert wooly("restore", saved).returncode == 0
    status = session.status()
    assert [(one.state, one.readers) for one in status.models] == [("committed", 0)]
    assert session.remove(MANIFEST.key) == MANIFEST.key
    assert steady_fds(store) == before


def test_saving_and_restoring_need_no_torch():
    """Neither the commands nor the modules that they use import it."""
    program = (
        "import sys\n"
        "import shared_store.disk.obtain, shared_store.disk.saver\n"
        "import shared_store.cli.verify, shared_store.cli.save, shared_store.cli.restore\n"
        "print(sorted({'torch', 'cupy', 'cuda', 'numpy', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
