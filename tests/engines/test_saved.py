"""vLLM engines on saved models: the checkpoint's bytes are not needed, and the tokens are the same.

The weights of the checkpoint are overwritten with zeros. A store gets the digests of before, as if the files had not
changed, so that engines open the saved model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines import stop_store
from support.saved import UNSEALED, turn_a_bit
from support.stores import StoreProcess
from support.waiting import wait_until

from shared_store.base.checkpoint import file_id, hash_files
from shared_store.base.status import Status
from shared_store.client.session import Session

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture
def own_checkpoint(checkpoint: Any, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint that may be overwritten."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


@pytest.fixture
def later_store(runtime_dir: Path) -> Iterator[StoreProcess]:
    """Return a store, to be started after the first one has ended, whose memory is not sealed."""
    store = StoreProcess(runtime_dir, program=UNSEALED, redis_url=f"unix://{runtime_dir}/away")
    yield store
    store.clean_up()


def wooly(runtime_dir: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "shared_store.cli", *arguments]
    environment = {**os.environ, "WOOLY_RUNTIME_DIR": str(runtime_dir)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


def spoil(files: list[Path]) -> None:
    for file in files:
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.write(bytes(size))


def test_saved_models_serve_without_their_checkpoint(
    engine: Any, runtime_dir: Path, own_checkpoint: Path, later_store: StoreProcess, tmp_path: Path
) -> None:
    """Publish and save; restore and attach in another store; after a bit flip, the next engine restores again."""
    cache = {"WOOLY_CACHE_DIR": str(tmp_path / "cache")}
    publisher = engine(own_checkpoint, environment=cache, load_format="wooly", extra={"fallback": False})
    assert publisher.finish() == 0, "\n".join(publisher.log[-40:])
    tokens = publisher.wait("answered")["tokens"]
    with Session.connect(runtime_dir, autostart=False) as session:
        (model,) = session.status().models
        entry = tmp_path / "cache" / model.key
        wait_until((entry / "wooly.json").exists, "the published model to be in the cache")
        wooly(runtime_dir, "save", model.key, "--to", str(tmp_path / "saved"))
    stop_store(runtime_dir)

    files = sorted(own_checkpoint.glob("*.safetensors"))
    digests = [found.digest for found in hash_files(files)]
    spoil(files)
    later_store.start()
    with Session.connect(runtime_dir, autostart=False) as session:
        session.remember_files([(file_id(file), digest) for file, digest in zip(files, digests, strict=True)])

        assert "restored" in wooly(runtime_dir, "restore", str(tmp_path / "saved"))
        reader = engine(own_checkpoint, load_format="wooly", extra={"mode": "load"})
        assert reader.finish() == 0, "\n".join(reader.log[-40:])
        answered = reader.wait("answered")
        assert (answered["tokens"], answered["role"]) == (tokens, "reader")
        wait_until(lambda: model_of(session.status()).readers == 0, "the reader to be gone")

        turn_a_bit(runtime_dir, model.key)
        extra = {"mode": "load", "restore_from": str(tmp_path / "saved")}
        careful = engine(own_checkpoint, environment={"WOOLY_VERIFY": "attach"}, load_format="wooly", extra=extra)
        assert careful.finish() == 0, "\n".join(careful.log[-40:])
        assert careful.wait("answered")["tokens"] == tokens
        assert any("do not match their digests" in line for line in careful.log)
        assert session.status().counters.publishes == 2  # both from disk
        assert session.status().counters.fallbacks == 0
    wooly(runtime_dir, "verify", "--all")


def model_of(status: Status) -> Any:
    (model,) = status.models
    return model
