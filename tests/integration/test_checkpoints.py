"""The checkpoints that other tests rely on: the same bytes every time, and copies that differ in one tensor only."""

from __future__ import annotations

import pytest
from support.models import families
from support.models.zeroed import zero_one_norm


def _files(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_random_model_has_the_same_bytes_every_time(family, tmp_path):
    """Two caches contain equal files, and a second call makes nothing."""
    first, second = (families.random_model(family, tmp_path / name) for name in ("one", "two"))
    assert _files(first) == _files(second)
    made = first.stat().st_mtime_ns
    assert families.random_model(family, tmp_path / "one") == first
    assert first.stat().st_mtime_ns == made


@pytest.mark.parametrize("family", families.COMMON)
def test_zeroed_norm_differs_in_one_tensor_and_in_nothing_that_stat_shows(family, tmp_path):
    """Names, shapes, sizes and modification times are equal; only the values of the named tensor differ."""
    from safetensors.torch import load_file

    source = families.random_model(family, tmp_path)
    name = zero_one_norm(source, tmp_path / "zeroed")
    for file in source.iterdir():
        before, after = file.stat(), (tmp_path / "zeroed" / file.name).stat()
        assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    original, zeroed = (load_file(path / "model.safetensors") for path in (source, tmp_path / "zeroed"))
    assert [key for key in original if not original[key].equal(zeroed[key])] == [name]
    assert not zeroed[name].any()
