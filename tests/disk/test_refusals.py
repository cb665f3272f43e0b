"""A saved model that was changed is refused with a `SavedModelError`, and none of it is published."""

from __future__ import annotations

import base64
import json
import os
import shutil

import msgspec
import pytest
from support.content import blob, content, key
from support.waiting import open_fds

from shared_store.base import manifest as manifests
from shared_store.base.digest import digest
from shared_store.base.errors import OutOfMemoryError, SavedModelError
from shared_store.disk.restore import restore_resident
from shared_store.disk.saved import SavedModel

NAME = "model.safetensors"


def rewrite(directory, change):
    """Change the description and seal it again, as an attacker who knows the format could."""
    path = directory / "wooly.json"
    saved = json.loads(path.read_text())["saved"]
    change(saved)
    text = json.dumps(saved)
    path.write_text('{"digest":"%s","saved":%s}' % (digest(text.encode()).hex(), text))  # noqa: UP031 - braces


def flip(path, offset):
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def as_manifest(saved, **changes):
    """Change fields of the manifest in a description."""
    made = msgspec.structs.replace(manifests.decode(base64.b64decode(saved["manifest"])), **changes)
    saved["manifest"] = base64.b64encode(manifests.encode(made)).decode()


def outside(directory):
    """Copy the file to outside the directory, with the right bytes."""
    shutil.copy(directory / NAME, directory.parent / "outside.safetensors")


def link(directory):
    """Replace the file by a link to a copy outside."""
    outside(directory)
    (directory / NAME).unlink()
    (directory / NAME).symlink_to(directory.parent / "outside.safetensors")


def pipe(directory):
    """Replace the file by a named pipe."""
    (directory / NAME).unlink()
    os.mkfifo(directory / NAME)


def overlap(saved):
    """Give two blobs the same location, so that they do not fill the file."""
    saved["blobs"][1]["offset"] = saved["blobs"][0]["offset"]


def swap_sizes(saved):
    """Exchange the sizes of two blobs."""
    first, second = saved["blobs"][0], saved["blobs"][1]
    first["bytes"], second["bytes"] = second["bytes"], first["bytes"]
    second["offset"] = first["offset"] + first["bytes"]


def named(name):
    """Return a change that renames the file in the description."""
    return lambda saved: saved["files"][0].update(name=name)


BEFORE_READING = {
    "truncated": lambda d: os.truncate(d / NAME, (d / NAME).stat().st_size - 1),
    "longer": lambda d: os.truncate(d / NAME, (d / NAME).stat().st_size + 1),
    "empty file": lambda d: os.truncate(d / NAME, 0),
    "no file": lambda d: (d / NAME).unlink(),
    "changed header": lambda d: flip(d / NAME, 20),
    "changed header length": lambda d: flip(d / NAME, 0),
    "link": link,
    "pipe": pipe,
    "directory for a file": lambda d: ((d / NAME).unlink(), (d / NAME).mkdir()),
    "no description": lambda d: (d / "wooly.json").unlink(),
    "empty description": lambda d: os.truncate(d / "wooly.json", 0),
    "truncated description": lambda d: os.truncate(d / "wooly.json", 300),
    "changed description": lambda d: flip(d / "wooly.json", 200),
    "description of something else": lambda d: (d / "wooly.json").write_text('{"model_type": "llama"}'),
    "description of binary rubbish": lambda d: (d / "wooly.json").write_bytes(content(1, 5000)),
    "deeply nested description": lambda d: (d / "wooly.json").write_text('{"saved":' + "[" * 100_000),
    "huge description": lambda d: os.truncate(d / "wooly.json", 1 << 40),
    "another format": lambda d: rewrite(d, lambda s: s.update(schema="wooly.saved/2")),
    "missing field": lambda d: rewrite(d, lambda s: s.pop("files")),
    "field of another type": lambda d: rewrite(d, lambda s: s.update(blobs="none")),
    "name with a path": lambda d: (outside(d), rewrite(d, named("../outside.safetensors"))),
    "absolute name": lambda d: (outside(d), rewrite(d, named(str(d.parent / "outside.safetensors")))),
    "hidden name": lambda d: rewrite(d, named(".safetensors")),
    "name with a zero": lambda d: rewrite(d, named("a\0.safetensors")),
    "no safetensors": lambda d: rewrite(d, named("wooly.json")),
    "one file twice": lambda d: rewrite(d, lambda s: s["files"].append(s["files"][0])),
    "negative header": lambda d: rewrite(d, lambda s: s["files"][0].update(header_bytes=-1)),
    "header beyond the file": lambda d: rewrite(d, lambda s: s["files"][0].update(header_bytes=1 << 60)),
    "blob outside": lambda d: rewrite(d, lambda s: s["blobs"][-1].update(offset=1 << 60)),
    "blob before the file": lambda d: rewrite(d, lambda s: s["blobs"][0].update(offset=-8)),
    "blob in no file": lambda d: rewrite(d, lambda s: s["blobs"][0].update(file=1)),
    "blob in file -1": lambda d: rewrite(d, lambda s: s["blobs"][0].update(file=-1)),
    "blobs over each other": lambda d: rewrite(d, overlap),
    "blob twice": lambda d: rewrite(d, lambda s: s["blobs"].append(s["blobs"][-1])),
    "blob missing": lambda d: rewrite(d, lambda s: s["blobs"].pop()),
    "negative blob": lambda d: rewrite(d, lambda s: s["blobs"][0].update(bytes=-1)),
    "sizes exchanged": lambda d: rewrite(d, swap_sizes),
    "no digest": lambda d: rewrite(d, lambda s: s["blobs"][0].update(digest="xyz")),
    "short digest": lambda d: rewrite(d, lambda s: s["blobs"][0].update(digest="ab")),
    "another model's manifest": lambda d: rewrite(d, lambda s: as_manifest(s, key=key(9))),
    "manifest of other blobs": lambda d: rewrite(d, lambda s: as_manifest(s, blobs=(blob(b"x" * (5 << 20)),) * 5)),
    "no manifest": lambda d: rewrite(d, lambda s: s.update(manifest="AAAA")),
    "no key": lambda d: rewrite(d, lambda s: (as_manifest(s, key="../x"), s.update(key="../x"))),
}


@pytest.fixture(params=BEFORE_READING)
def tampered(request, saved):
    """Change a saved model in one way."""
    BEFORE_READING[request.param](saved)
    return saved


def test_refused_before_a_blob_is_read(tampered):
    """Every change is the same class of error, which names the directory, and leaves no file open."""
    fds = open_fds()
    with pytest.raises(SavedModelError) as caught:
        SavedModel(tampered)
    assert str(tampered) in str(caught.value)
    assert open_fds() == fds


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_changed_tensor_is_refused_and_located(saved, wooly, session, at):
    """One flipped bit: exit code 19, file and offset; nothing is published and nothing stays allocated."""
    place = json.loads((saved / "wooly.json").read_text())["saved"]["blobs"][at]
    flip(saved / NAME, place["offset"] + place["bytes"] // 2)
    done = wooly("restore", saved)
    assert (done.returncode, done.stdout) == (19, "")
    assert f"{saved / NAME} was changed: its {place['bytes']} bytes from {place['offset']} on" in done.stderr
    assert done.stderr.endswith("[saved_model]\n")
    status = session.status()
    assert (status.models, status.totals.resident_bytes) == ((), 0)
    flip(saved / NAME, place["offset"] + place["bytes"] // 2)
    assert wooly("restore", saved).returncode == 0


def test_a_file_truncated_after_opening_is_refused(saved, session):
    """Its length was right when it was opened."""
    with SavedModel(saved) as opened:
        os.truncate(saved / NAME, 4 << 20)
        with pytest.raises(SavedModelError, match="is incomplete"):
            restore_resident(session, opened, "cpu")
    assert session.status().models == ()
    assert session.alive


def test_a_file_replaced_after_opening_has_no_effect(saved, session):
    """The files that were checked are the files that are read."""
    with SavedModel(saved) as opened:
        for file in saved.iterdir():
            file.unlink()
        (saved / NAME).write_bytes(b"something else")
        assert restore_resident(session, opened, "cpu").result == "restored"
    assert session.status().models[0].state == "committed"


def test_a_model_larger_than_the_limit_changes_nothing(saved, start_store, directory, store):
    """The store's error is passed on; no publication and no memory is left."""
    assert store.stop() == 0
    client = start_store(redis_url=f"unix://{directory}/away", max_resident={"cpu": 4 << 20}).client()
    with SavedModel(saved) as opened, pytest.raises(OutOfMemoryError):
        restore_resident(client.session, opened, "cpu")
    assert client.session.status().models == ()
    assert client.session.status().totals.resident_bytes == 0


@pytest.mark.usefixtures("store")
def test_an_unknown_device_is_named_in_the_error(saved, wooly):
    """Exit code 2."""
    done = wooly("restore", saved, "--device", "GPU-0000")
    assert done.returncode == 2
    assert "GPU-0000" in done.stderr


def test_the_whole_description_is_covered_by_its_digest(saved):
    """A change of any byte is refused, or does not change the content."""
    path = saved / "wooly.json"
    good = path.read_bytes()
    with SavedModel(saved) as opened:
        right = opened.description
    for offset in range(len(good)):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :])
        try:
            with SavedModel(saved) as opened:
                assert opened.description == right
        except SavedModelError:
            continue
