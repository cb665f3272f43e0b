"""Loading from the cache directory: the checkpoint's weights are not needed."""

from __future__ import annotations

from support.waiting import wait_until

from shared_store.base.checkpoint import file_id, hash_files
from shared_store.client.session import Session


def test_a_published_model_is_cached_and_restored_for_the_next_process(job, fresh, store, tmp_path):
    """The checkpoint's weights are zeros by then, and the store has their earlier digests."""
    path = fresh("llama-tied")
    one = job("caching", WOOLY_CACHE_DIR=str(tmp_path / "cache"), WOOLY_STRICT="1")
    before = one.run("my_model = load(path); result = describe(my_model)", path=path)
    with Session.connect(store.directory, autostart=False) as session:
        (model,) = session.status().models
        wait_until((tmp_path / "cache" / model.key / "wooly.json").exists, "the model to be in the cache")
        one.forget()
        wait_until(lambda: session.status().models[0].readers == 0, "the model to be free")
        session.remove(model.key)

        weights = path / "model.safetensors"
        (hashed,) = hash_files([weights])
        with weights.open("r+b") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header)
            file.write(bytes(weights.stat().st_size - 8 - header))
        session.remember_files([(file_id(weights), hashed.digest)])
        after = one.run("my_model = load(path); result = describe(my_model)", path=path)
        assert after == before
        (again,) = session.status().models
        assert (again.key, again.readers) == (model.key, 1)
        assert session.status().counters.fallbacks == 0
