"""Descriptors with an owner: closed once, passed on once, and found when they are dropped."""

from __future__ import annotations

import os
import resource

import pytest
from support.waiting import open_fds

from shared_store.runtime.fds import OwnedFd, OwnedFds, duplicate


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def pipe():
    """A pipe; both ends are closed with the test."""
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        if is_open(fd):
            os.close(fd)


def test_a_block_closes_its_descriptor_also_when_it_raises(pipe):
    def use(fd):
        with fd:
            assert fd.fileno() == pipe[0]
            raise KeyError

    fd = OwnedFd(pipe[0])
    with pytest.raises(KeyError):
        use(fd)
    assert not is_open(pipe[0])
    assert fd.closed


def test_a_descriptor_is_closed_once(pipe):
    """A second close must not hit a file that got the number meanwhile."""
    fd = OwnedFd(pipe[0])
    fd.close()
    again = os.dup(pipe[1])
    assert again == pipe[0]
    fd.close()
    assert is_open(again)
    os.close(again)


def test_a_detached_descriptor_stays_open_and_belongs_to_the_caller(pipe):
    with OwnedFd(pipe[0]) as fd:
        assert fd.detach() == pipe[0]
        assert fd.closed
    assert is_open(pipe[0])


@pytest.mark.parametrize("end", [OwnedFd.close, OwnedFd.detach])
def test_a_descriptor_is_not_used_after_its_end(pipe, end):
    fd = OwnedFd(pipe[0])
    end(fd)
    for use in (fd.fileno, fd.detach, fd.dup):
        with pytest.raises(ValueError, match="closed, or was passed on"):
            use()


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="-1 is not a descriptor"):
        OwnedFd(-1)


def test_a_duplicate_is_of_the_same_file_and_not_inherited(pipe):
    with OwnedFd(os.dup(pipe[1])) as fd, fd.dup() as other, duplicate(pipe[1]) as third:
        assert len({fd.fileno(), other.fileno(), third.fileno()}) == 3
        assert not os.get_inheritable(other.fileno())
        assert not os.get_inheritable(third.fileno())
        os.write(other.fileno(), b"1")
        os.write(third.fileno(), b"2")
        assert os.read(pipe[0], 2) == b"12"


def test_a_descriptor_that_is_dropped_is_closed_and_reported(pipe):
    fds = [OwnedFd(pipe[0])]
    with pytest.warns(ResourceWarning, match=f"descriptor {pipe[0]} was never closed"):
        fds.clear()
    assert not is_open(pipe[0])


def test_several_are_closed_together_and_in_the_order_of_their_message():
    before = open_fds()
    ints = [os.dup(0) for _ in range(3)]
    with OwnedFds.from_ints(ints) as fds:
        fds.add(OwnedFd(os.dup(0)))
        assert fds.filenos()[:3] == tuple(ints)
        assert [fd.fileno() for fd in fds] == list(fds.filenos())
        assert len(fds) == 4
    assert open_fds() == before
    assert len(fds) == 0


def test_several_are_passed_on_together():
    with OwnedFds.from_ints([os.dup(0), os.dup(0)]) as fds:
        passed = fds.detach()
    assert all(is_open(fd.fileno()) for fd in passed)
    OwnedFds(passed).close()


def test_a_descriptor_that_cannot_be_closed_does_not_keep_the_others_open():
    ints = [os.dup(0) for _ in range(3)]
    fds = OwnedFds.from_ints(ints)
    os.close(ints[1])
    with pytest.raises(OSError, match="Bad file descriptor"):
        fds.close()
    assert not any(is_open(fd) for fd in ints)
    fds.close()


def test_duplicates_are_all_made_or_none():
    """A limit of open files that is reached in the middle leaves nothing behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with OwnedFds.duplicates([0, 1]) as fds:
        assert len(fds) == 2
    before = open_fds()
    lowest = os.dup(0)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
        with pytest.raises(OSError, match="Too many open files"):
            OwnedFds.duplicates([0] * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before
