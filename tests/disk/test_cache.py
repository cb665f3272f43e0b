"""The cache directory: filled in the background, and kept under its limit."""

from __future__ import annotations

import os

import msgspec
import pytest
from disk.conftest import CONTENTS, KEY
from support.content import key
from support.programs import finish_program, start_program
from support.saved import publish, resident
from support.waiting import wait_until

from shared_store.base.errors import ConfigError, DiskError, UnsafePathError
from shared_store.disk.cache import Cache, configured
from shared_store.disk.saved import SavedModel
from shared_store.disk.saver import LOG, run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Configure a cache directory in the environment."""
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "cache"))
    found = configured()
    assert found is not None
    return found


def put(cache, number, nbytes):
    """Make an entry of `nbytes` bytes whose time of last use is `number`."""
    entry = cache.path(key(number))
    entry.mkdir()
    (entry / "wooly.json").write_bytes(b"")
    (entry / "model.safetensors").write_bytes(bytes(nbytes))
    os.utime(entry, (number, number))
    return entry


def entries(cache):
    """Return the keys of all entries."""
    return sorted(path.name for path in cache.directory.iterdir() if not path.name.startswith("."))


def test_least_recently_used_entries_are_evicted_first(tmp_path):
    """Only as many as needed; an entry that was touched counts as used."""
    cache = Cache(tmp_path, 1000)
    for number in range(1, 5):
        put(cache, number, 250)
    cache.touch(key(1))
    assert cache.evict(0) == []
    assert cache.evict(300) == [key(2), key(3)]
    assert entries(cache) == [key(1), key(4)]
    assert cache.evict(1000) == [key(4), key(1)]


def test_a_model_larger_than_the_cache_evicts_nothing(tmp_path):
    cache = Cache(tmp_path, 1000)
    put(cache, 1, 900)
    with pytest.raises(DiskError, match="WOOLY_CACHE_MAX_BYTES"):
        cache.evict(1001)
    assert entries(cache) == [key(1)]


def test_the_next_writer_removes_leftovers_of_killed_processes(tmp_path):
    """Both of an unfinished save and of an unfinished removal."""
    cache = Cache(tmp_path, 1000)
    (tmp_path / f".{key(1)}.unfinished-abc").mkdir()
    put(cache, 2, 10).rename(tmp_path / f".{key(2)}.unfinished-1")
    with cache.locked():
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_directory_is_created_for_its_owner_alone(cache):
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert cache.max_bytes == 100 << 30


def test_without_the_variable_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("WOOLY_CACHE_DIR", raising=False)
    assert configured() is None


def test_a_directory_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    """So is a link, even to a directory that they cannot write to, and a file."""
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o770)
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "closed")
    (tmp_path / "file").touch()
    for name in ("open", "link"):
        monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / name))
        with pytest.raises(UnsafePathError):
            configured()
    monkeypatch.setenv("WOOLY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError):
        configured()


def test_the_limit_has_a_unit(cache, monkeypatch):
    """A malformed size is an error that names the variable."""
    monkeypatch.setenv("WOOLY_CACHE_MAX_BYTES", "1.5 GiB")
    assert configured() == Cache(cache.directory, 3 << 29)
    monkeypatch.setenv("WOOLY_CACHE_MAX_BYTES", "plenty")
    with pytest.raises(ConfigError, match="WOOLY_CACHE_MAX_BYTES='plenty'"):
        configured()


PUBLISHED = """
from shared_store.disk.saver import save_in_background
save_in_background(sys.argv[1])
import os, signal
os.kill(os.getpid(), signal.SIGKILL)  # the engine is killed right afterwards
"""


def test_a_published_model_is_saved_after_its_engine_was_killed(cache, model, session):
    """The engine does not wait for the saver; the entry is a complete saved model."""
    process = start_program(PUBLISHED, KEY)
    assert process.wait(timeout=30) == -9
    process.communicate()
    entry = wait_until(lambda: cache.find(KEY), "the model to be saved")
    wait_until(lambda: f"key {KEY}" in (cache.directory / LOG).read_text(), "the saver to log it")
    with SavedModel(entry) as saved:
        assert saved.manifest == model
    wait_until(lambda: session.status().models[0].readers == 0, "the saver to end")


def test_of_several_savers_one_saves(cache, model):
    """They exclude each other, and the later ones find the entry."""
    program = "from shared_store.disk import saver, cache\nprint(saver.run(cache.configured(), sys.argv[1]))"
    processes = [start_program(program, model.key) for _ in range(3)]
    assert sorted(finish_program(process) for process in processes) == ["False", "False", "True"]
    assert entries(cache) == [KEY]


def test_a_saver_evicts(cache, model, session):
    """The least recently used entry is removed for the new one."""
    del model
    small = Cache(cache.directory, 9 << 20)
    put(small, 1, 1 << 20)
    put(small, 2, 1 << 10)
    assert run(small, KEY)
    assert entries(cache) == [key(2), KEY]
    assert [found.readers for found in session.status().models] == [0]


@pytest.mark.parametrize("module", ["shared_store.disk.saver", "shared_store.transfer.saver"])
def test_a_saver_logs_why_it_saved_nothing(cache, model, monkeypatch, module):
    """The model exceeds the limit, or is not in the store. The second name is the one that earlier versions start."""
    monkeypatch.setenv("WOOLY_CACHE_MAX_BYTES", "1MiB")
    for argument, code in ((model.key, 20), (key(99), 9)):
        program = f"import runpy\nsys.argv[1:] = [{argument!r}]\nrunpy.run_module({module!r}, run_name='__main__')"
        process = start_program(program)
        _, logged = process.communicate(timeout=30)
        assert process.returncode == code
        assert f"{argument} was not saved" in logged
    assert entries(cache) == []


def test_entries_are_named_by_weight_key(cache, model, session):
    """A second model is saved beside the first."""
    publish(session, msgspec.structs.replace(model, key=key(8)), CONTENTS)
    assert run(cache, KEY)
    assert run(cache, key(8))
    assert entries(cache) == sorted([KEY, key(8)])
    assert resident(session, key(8))[1] == CONTENTS
