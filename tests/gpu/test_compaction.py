"""Compaction of a GPU's memory: a client copies, because the store has no CUDA context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.content import blob, content, key, manifest_of
from support.saved import publish
from support.stores import StoreProcess

from shared_store.client.session import Session
from shared_store.disk.restore import restore_resident
from shared_store.disk.save import save_resident
from shared_store.disk.saved import SavedModel
from shared_store.transfer.resident import committed

pytestmark = pytest.mark.gpu

SMALL = 3
MIB = 1 << 20


def wooly(runtime_dir: Any, *arguments: str) -> Any:
    command = [sys.executable, "-m", "shared_store.cli", *arguments, "--json"]
    environment = {**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_small_models_are_packed_and_their_bytes_stay(gpu: str, runtime_dir: Any, tmp_path: Any) -> None:
    """Models in a segment each share one after compaction, and every digest is right."""
    store = StoreProcess(runtime_dir, redis_url=f"unix://{runtime_dir}/away").start()
    try:
        with Session.connect(runtime_dir, autostart=False) as session:
            for number in range(1, SMALL + 1):
                data = [content(number, 300_000), content(100 + number, 77)]
                publish(session, manifest_of(key(number), [blob(one) for one in data]), data)
                model = committed(session.status().models, key(number))
                save_resident(session, model, tmp_path / str(number))
                session.remove(key(number))
                with SavedModel(tmp_path / str(number)) as saved:
                    restore_resident(session, saved, gpu)
            before = next(device for device in session.status().devices if device.id == gpu)
            assert (before.segments, before.resident_bytes) == (SMALL, SMALL * 2 * MIB)
            (report,) = wooly(runtime_dir, "compact", "--device", gpu)
            assert report["freed_bytes"] == (SMALL - 1) * 2 * MIB
            after = next(device for device in session.status().devices if device.id == gpu)
            assert (after.segments, after.resident_bytes) == (1, 2 * MIB)
            found = wooly(runtime_dir, "verify", "--all")
            assert [one["result"] for one in found] == ["ok"] * SMALL
    finally:
        store.clean_up()
