"""Obtaining a model: from the store, from a saved model, or not at all; never with a wrong byte."""

from __future__ import annotations

import os
import shutil

import pytest
from disk.conftest import CONTENTS, KEY, MANIFEST
from support.content import key
from support.saved import UNSEALED, publish, resident, turn_a_bit

from shared_store.base.errors import ModelNotFoundError, SavedModelError
from shared_store.client.session import Session
from shared_store.disk.cache import configured
from shared_store.disk.obtain import Need, obtain
from shared_store.memory import MemfdBackend
from shared_store.transfer.resident import attach, committed
from shared_store.transfer.verify import quarantine

NAME = "model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch, saved):
    """Configure a cache directory that contains the model."""
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "cache"))
    found = configured()
    assert found is not None
    shutil.move(saved, found.path(KEY))
    return found


def ask(session, model_key=KEY, *, may_publish=True, restore_from=None):
    """Obtain a model as an engine does: `loads` if the engine would load it now, otherwise `attached`."""
    need = Need(model_key, "model", "test", may_publish, 10.0, restore_from)
    opened = obtain(session, need, MemfdBackend())
    if opened is None:
        return "loads"
    attached, fds = opened
    assert len(fds) == len(attached.segments)
    fds.close()
    return "attached"


def cut(entry):
    """Truncate the file of a saved model."""
    os.truncate(entry / NAME, 1 << 20)


def change(entry):
    """Overwrite bytes of a saved tensor."""
    with (entry / NAME).open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"\0\1\2\3")


def test_without_a_saved_model_the_engine_loads(session):
    assert ask(session) == "loads"
    assert session.status().models[0].state == "publishing"


def test_a_granted_publication_restores_from_the_cache(session, cache):
    """The engine is a reader, the model in the store is complete, and the entry counts as used."""
    os.utime(cache.path(KEY), (1, 1))
    assert ask(session) == "attached"
    (client,) = session.status().clients
    assert (client.role, client.key) == ("reader", KEY)
    session.leave(KEY)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)
    assert cache.path(KEY).stat().st_mtime > 1e9


def test_a_model_that_is_not_in_the_cache_is_loaded(session, cache):
    assert cache.find(KEY)
    assert ask(session, key(8)) == "loads"


def test_a_resident_model_is_attached_to_without_the_cache(session, cache, store):
    """A corrupted entry is not opened."""
    store.client().publish(KEY, [[5, 1000]])
    cut(cache.path(KEY))
    assert ask(session) == "attached"
    assert session.status().counters.fallbacks == 0


@pytest.mark.parametrize("spoil", [cut, change])
def test_a_corrupted_entry_is_removed_and_the_engine_loads(session, cache, spoil, caplog):
    """It is counted as a fallback. The engine still has the publication, and what it publishes is complete."""
    spoil(cache.path(KEY))
    assert ask(session) == "loads"
    assert cache.find(KEY) is None
    assert session.status().counters.fallbacks == 1
    assert f"{NAME}" in caplog.text
    assert "[saved_model]" in caplog.text
    session.abandon(KEY, "the test publishes the model itself")
    publish(session, MANIFEST, CONTENTS)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)


def test_an_entry_renamed_to_another_key_is_refused(session, cache):
    """The key in the manifest counts, not the directory's name."""
    cache.path(KEY).rename(cache.path(key(8)))
    assert ask(session, key(8)) == "loads"
    assert cache.find(key(8)) is None


def test_an_engine_that_may_not_load_restores_from_a_directory(session, saved):
    """`mode: load` with `restore_from`."""
    assert ask(session, may_publish=False, restore_from=saved) == "attached"
    session.leave(KEY)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)


def test_a_refused_directory_is_an_error_for_an_engine_that_may_not_load(session, saved):
    """The publication is aborted, and the directory is not removed: it is not the cache's."""
    change(saved)
    with pytest.raises(SavedModelError, match="was changed"):
        ask(session, may_publish=False, restore_from=saved)
    assert session.status().models == ()
    assert (saved / NAME).exists()
    with pytest.raises(SavedModelError, match="is not the model that this engine needs"):
        ask(session, key(8), may_publish=False, restore_from=saved)
    with pytest.raises(ModelNotFoundError):
        ask(session, may_publish=False)


def test_an_engine_that_may_load_falls_back_from_a_refused_directory(session, saved):
    """Counted as a fallback; also when the directory does not exist."""
    change(saved)
    assert ask(session, restore_from=saved) == "loads"
    assert ask(session, key(8), restore_from=saved / "not there") == "loads"
    assert session.status().counters.fallbacks == 2


def test_an_unsafe_cache_is_logged_and_not_used(session, monkeypatch, tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "open"))
    assert ask(session) == "loads"
    assert "not using the cache" in caplog.text


class TestVerifiedOnAttaching:
    """`WOOLY_VERIFY=attach`, on a store whose segments can be written to."""

    @pytest.fixture
    def store(self, start_store, directory, monkeypatch):
        monkeypatch.setenv("WOOLY_VERIFY", "attach")
        return start_store(redis_url=f"unix://{directory}/away", program=UNSEALED)

    def test_sound(self, session, model):
        assert ask(session, model.key) == "attached"

    def test_a_changed_byte_makes_the_engine_load(self, session, model, directory, caplog):
        """The blob is quarantined and logged, and this engine publishes the model again."""
        turn_a_bit(directory, model.key, blob=2)
        assert ask(session, model.key) == "loads"
        assert "1 blobs of model do not match their digests" in caplog.text
        assert [found.state for found in session.status().models] == ["publishing"]
        session.abandon(model.key, "the test publishes the model itself")
        publish(session, MANIFEST, CONTENTS)
        assert ask(session, model.key) == "attached"

    def test_a_changed_byte_makes_the_engine_restore(self, session, model, directory, cache):
        """The model is in the cache and restored from it."""
        assert cache.find(model.key)
        turn_a_bit(directory, model.key)
        assert ask(session, model.key) == "attached"
        session.leave(model.key)
        assert resident(session, model.key) == (MANIFEST, CONTENTS)

    def test_an_engine_that_may_not_load_gets_an_error(self, session, model, directory):
        turn_a_bit(directory, model.key)
        with pytest.raises(ModelNotFoundError):
            ask(session, model.key, may_publish=False)

    def test_the_default_does_not_verify(self, session, model, directory, monkeypatch):
        """Attaching succeeds despite a changed byte, which also shows that the tests above can fail."""
        monkeypatch.setenv("WOOLY_VERIFY", "never")
        turn_a_bit(directory, model.key)
        assert ask(session, model.key) == "attached"

    def test_two_engines_find_the_same_mismatch(self, session, model, directory):
        """The second quarantine comes too late, and changes nothing."""
        turn_a_bit(directory, model.key)
        with Session.connect(directory, autostart=False) as other:
            with attach(other, committed(other.status().models, model.key), MemfdBackend()):
                assert ask(session, model.key) == "loads"
                quarantine(other, model.key, [model.blobs[0].digest])
            assert [found.state for found in session.status().models] == ["publishing"]
