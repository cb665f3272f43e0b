"""The digest kernels in the package are compiled from its source, for every GPU that it names."""

from __future__ import annotations

import struct

import pytest

from shared_store.base.errors import MemoryBackendError
from shared_store.memory.cuda import images
from shared_store.memory.cuda.kernels import IMAGES, SOURCE

CUDA_MACHINE = 190  # e_machine of an ELF file


@pytest.fixture(scope="module")
def compiled():
    return images.read(IMAGES)


def test_the_images_are_of_this_source(compiled):
    """A changed kernel, option or list of targets needs `python deploy/kernels.py`."""
    assert compiled.source == images.fingerprint(SOURCE.read_bytes())
    assert compiled.images.keys() == set(images.TARGETS)


def test_a_changed_source_has_another_fingerprint():
    assert images.fingerprint(SOURCE.read_bytes() + b"\n") != images.fingerprint(SOURCE.read_bytes())


def test_the_file_is_small():
    """It is part of every installation, also of those without a GPU."""
    assert IMAGES.stat().st_size < 300 << 10


@pytest.mark.parametrize("target", images.TARGETS)
def test_each_image_is_for_its_target_and_has_both_kernels(compiled, target):
    image = compiled.image(target)
    assert all(entry in image for entry in images.ENTRIES)
    kind, _, number = target.partition("_")
    if kind == "compute":
        assert f".target sm_{number}".encode() in image
        assert image.endswith(b"\0")  # the driver reads PTX as a string
    else:
        magic, machine = struct.unpack_from("<4s14xH", image)
        assert (magic, machine) == (b"\x7fELF", CUDA_MACHINE)


CHOICES = {
    (7, 0): [],
    (7, 5): ["sm_75", "compute_75"],
    (8, 0): ["sm_80", "compute_75"],
    (8, 7): ["sm_86", "sm_80", "compute_75"],
    (8, 9): ["sm_89", "sm_86", "sm_80", "compute_75"],
    (9, 0): ["sm_90", "compute_75"],
    (10, 3): ["sm_100", "compute_75"],
    (12, 1): ["sm_120", "compute_75"],
    (13, 0): ["compute_75"],
}


@pytest.mark.parametrize("capability", CHOICES)
def test_machine_code_of_the_same_major_capability_comes_first(capability):
    assert images.suitable(images.TARGETS, capability) == CHOICES[capability]


def test_a_damaged_file_is_a_typed_error(tmp_path):
    damaged = tmp_path / "blake3.kernels"
    damaged.write_bytes(IMAGES.read_bytes()[:1000])
    with pytest.raises(MemoryBackendError, match="install wooly again"):
        images.read(damaged)
