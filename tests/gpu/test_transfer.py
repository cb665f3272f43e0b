"""Models on a GPU: verified there, saved, and restored, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.content import blob, content, key, manifest_of
from support.hostmemory import reach_gpu_memory, reach_host_memory
from support.saved import publish, turn_a_bit
from support.stores import StoreProcess

from shared_store.base.errors import SavedModelError
from shared_store.client.session import Session
from shared_store.disk.restore import restore_resident
from shared_store.disk.save import save_resident
from shared_store.disk.saved import SavedModel
from shared_store.memory import backend_for
from shared_store.transfer.resident import committed

pytestmark = pytest.mark.gpu

KEY = key(1)
CONTENTS = [content(1, (9 << 20) + 12), content(2, 1000), content(3, 1), content(2, 1000), b"", content(4, 50 << 20)]


@pytest.fixture
def session(gpu, runtime_dir):
    """Connect to a private store; its catalog is unreachable."""
    assert backend_for(gpu).ordinal == 0  # whose memory these tests read
    store = StoreProcess(runtime_dir, redis_url=f"unix://{runtime_dir}/away").start()
    with Session.connect(runtime_dir, autostart=False) as connected:
        yield connected
    store.clean_up()


@pytest.fixture
def saved(session, tmp_path):
    """Save a model from host memory and remove it from the store; return the directory."""
    publish(session, manifest_of(KEY, [blob(data) for data in CONTENTS]), CONTENTS)
    save_resident(session, committed(session.status().models, KEY), tmp_path / "saved", shard_bytes=20 << 20)
    session.remove(KEY)
    return tmp_path / "saved"


def wooly(runtime_dir, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "shared_store.cli", *map(str, arguments)],
        env={**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def files(directory):
    """Return the bytes of the tensors' files."""
    return {path.name: path.read_bytes() for path in Path(directory).glob("*.safetensors")}


def test_round_trip_through_a_gpu(session, saved, gpu, runtime_dir, tmp_path):
    """A model restored to the GPU is verified and saved there: the files are bit-equal."""
    done = wooly(runtime_dir, "restore", saved, "--device", gpu, "--json")
    assert done.returncode == 0, done.stderr
    (model,) = session.status().models
    assert (model.device, model.state, model.readers) == (gpu, "committed", 0)
    verified = wooly(runtime_dir, "verify", "--all", "--json")
    assert verified.returncode == 0, verified.stderr
    (found,) = json.loads(verified.stdout)
    assert (found["result"], found["blobs"]) == ("ok", 5)
    again = tmp_path / "again"
    save_resident(session, model, again, shard_bytes=20 << 20)
    assert files(again) == files(saved)
    with SavedModel(again) as opened:
        assert opened.manifest.device == gpu


def test_a_changed_file_is_refused_on_the_gpu(session, saved, gpu):
    """Bytes are digested on the GPU."""
    place = next(one for one in json.loads((saved / "wooly.json").read_text())["saved"]["blobs"] if one["bytes"] > 1e7)
    with SavedModel(saved) as opened:
        name = opened.files[place["file"]].name
        with Path(name).open("r+b") as file:
            file.seek(place["offset"] + (7 << 20))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 16]))
        with pytest.raises(SavedModelError, match="was changed"):
            restore_resident(session, opened, gpu)
    assert session.status().models == ()
    assert session.status().totals.resident_bytes == 0


def test_a_stray_write_on_the_gpu_is_found(session, saved, gpu, runtime_dir):
    """One bit: exit code 11, and the model is withdrawn."""
    with SavedModel(saved) as opened:
        restore_resident(session, opened, gpu)
    reach_gpu_memory(0)
    try:
        turn_a_bit(runtime_dir, KEY, 5, backend_for(gpu))
    finally:
        reach_host_memory()
    done = wooly(runtime_dir, "verify", KEY, "--json")
    assert done.returncode == 11, done.stderr
    assert json.loads(done.stdout)[0]["mismatched"] == [blob(CONTENTS[5]).digest.hex()]
    assert session.status().models == ()
