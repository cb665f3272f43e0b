"""How an engine gets a model: from the store, from what was saved, or not at all; never with a wrong byte."""

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
from shared_store.disk.verify import quarantine
from shared_store.memory import MemfdBackend
from shared_store.transfer.reading import committed, reading

NAME = "model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch, saved):
    """A cache directory with the model in it."""
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "cache"))
    found = configured()
    assert found is not None
    shutil.move(saved, found.entry(KEY))
    return found


def ask(session, model_key=KEY, *, may_publish=True, restore_from=None):
    """What an engine does; `loads` where it would load the model now, else `attached`."""
    need = Need(model_key, "model", "test", may_publish, 10.0, restore_from)
    opened = obtain(session, need, MemfdBackend())
    if opened is None:
        return "loads"
    attached, fds = opened
    assert len(fds) == len(attached.segments)
    fds.close()
    return "attached"


def cut(entry):
    os.truncate(entry / NAME, 1 << 20)


def change(entry):
    with (entry / NAME).open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"\0\1\2\3")


def test_without_anything_saved_the_engine_loads(session):
    assert ask(session) == "loads"
    assert session.status().models[0].state == "publishing"


def test_granted_publication_looks_in_the_cache_first(session, cache):
    """The model is whole in the store, the engine reads it, and the entry counts as used."""
    os.utime(cache.entry(KEY), (1, 1))
    assert ask(session) == "attached"
    (client,) = session.status().clients
    assert (client.role, client.key) == ("reader", KEY)
    session.leave(KEY)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)
    assert cache.entry(KEY).stat().st_mtime > 1e9


def test_other_models_are_not_in_the_cache(session, cache):
    assert cache.find(KEY)
    assert ask(session, key(8)) == "loads"


def test_a_resident_model_is_attached_to_whatever_is_saved(session, cache, store):
    """The broken entry is not even opened."""
    store.client().publish(KEY, [[5, 1000]])
    cut(cache.entry(KEY))
    assert ask(session) == "attached"
    assert session.status().counters.fallbacks == 0


@pytest.mark.parametrize("spoil", [cut, change])
def test_a_spoilt_entry_is_removed_counted_and_the_engine_loads(session, cache, spoil, caplog):
    """The right to publish is still this engine's, and what it publishes then is whole."""
    spoil(cache.entry(KEY))
    assert ask(session) == "loads"
    assert cache.find(KEY) is None
    assert session.status().counters.fallbacks == 1
    assert f"{NAME}" in caplog.text
    assert "[saved_model]" in caplog.text
    session.abandon(KEY, "the test's own publication comes now")
    publish(session, MANIFEST, CONTENTS)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)


def test_an_entry_that_was_put_under_another_key_is_refused(session, cache):
    """What the file says counts, not where it lies."""
    cache.entry(KEY).rename(cache.entry(key(8)))
    assert ask(session, key(8)) == "loads"
    assert cache.find(key(8)) is None


def test_restored_from_a_directory_by_an_engine_that_would_not_load(session, saved):
    """`mode: load` with a directory."""
    assert ask(session, may_publish=False, restore_from=saved) == "attached"
    session.leave(KEY)
    assert resident(session, KEY) == (MANIFEST, CONTENTS)


def test_a_refused_directory_is_an_error_for_an_engine_that_would_not_load(session, saved):
    """The next engine in line is not held up, and the directory stays: it is not the cache's."""
    change(saved)
    with pytest.raises(SavedModelError, match="was changed"):
        ask(session, may_publish=False, restore_from=saved)
    assert session.status().models == ()
    assert (saved / NAME).exists()
    with pytest.raises(SavedModelError, match="another model than this engine needs"):
        ask(session, key(8), may_publish=False, restore_from=saved)
    with pytest.raises(ModelNotFoundError):
        ask(session, may_publish=False)


def test_a_refused_directory_is_loaded_instead_by_an_engine_that_may(session, saved):
    """And counted; a directory that is not there is one of those."""
    change(saved)
    assert ask(session, restore_from=saved) == "loads"
    assert ask(session, key(8), restore_from=saved / "not there") == "loads"
    assert session.status().counters.fallbacks == 2


def test_a_cache_that_cannot_be_used_is_said_and_done_without(session, monkeypatch, tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "open"))
    assert ask(session) == "loads"
    assert "no cache is used" in caplog.text


class TestVerifiedOnAttaching:
    """`WOOLY_VERIFY=attach`, on a store in which bytes can change."""

    @pytest.fixture
    def store(self, start_store, directory, monkeypatch):
        monkeypatch.setenv("WOOLY_VERIFY", "attach")
        return start_store(redis_url=f"unix://{directory}/away", program=UNSEALED)

    def test_sound(self, session, model):
        assert ask(session, model.key) == "attached"

    def test_a_changed_byte_makes_the_engine_load(self, session, model, directory, caplog):
        """It is quarantined, said, and this engine is the one that publishes the model anew."""
        turn_a_bit(directory, model.key, blob=2)
        assert ask(session, model.key) == "loads"
        assert "1 blobs of model are not what their digests say" in caplog.text
        assert [one.state for one in session.status().models] == ["publishing"]
        session.abandon(model.key, "the test's own publication comes now")
        publish(session, MANIFEST, CONTENTS)
        assert ask(session, model.key) == "attached"

    def test_a_changed_byte_makes_the_engine_restore(self, session, model, directory, cache):
        """Where the model is saved, it comes from there."""
        assert cache.find(model.key)
        turn_a_bit(directory, model.key)
        assert ask(session, model.key) == "attached"
        session.leave(model.key)
        assert resident(session, model.key) == (MANIFEST, CONTENTS)

    def test_an_engine_that_would_not_load_gets_an_error(self, session, model, directory):
        turn_a_bit(directory, model.key)
        with pytest.raises(ModelNotFoundError):
            ask(session, model.key, may_publish=False)

    def test_not_asked_for_not_done(self, session, model, directory, monkeypatch):
        """The default: the check costs time, so it is a choice. The test shows that the others can fail."""
        monkeypatch.setenv("WOOLY_VERIFY", "never")
        turn_a_bit(directory, model.key)
        assert ask(session, model.key) == "attached"

    def test_two_engines_find_it_at_once(self, session, model, directory):
        """The second one's quarantine comes too late, and it waits for the first one, who publishes."""
        turn_a_bit(directory, model.key)
        with Session.connect(directory, autostart=False) as other:
            with reading(other, committed(other.status().models, model.key), MemfdBackend()):
                assert ask(session, model.key) == "loads"
                quarantine(other, model.key, [model.blobs[0].digest])
            assert [one.state for one in session.status().models] == ["publishing"]
