"""Errors that a refused write may have caused get a note with a pointer to the documentation; others do not."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def refused_writes() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own imports warn about deprecations in torch
        from wooly_vllm.memory import refused_writes
    refused_writes._log_once.cache_clear()
    yield refused_writes
    refused_writes._log_once.cache_clear()


class _Worker:
    def execute_model(self, error: BaseException | None, *, answer: str = "done") -> str:
        if error is not None:
            raise error
        return answer


def test_an_illegal_access_is_explained_once_and_raised(
    refused_writes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers of the worker see the same error: one note, one log line, and the same error object."""
    monkeypatch.setattr(_Worker, "execute_model", refused_writes._explaining(_Worker.execute_model))
    monkeypatch.setattr(_Worker, "execute_model", refused_writes._explaining(_Worker.execute_model))
    monkeypatch.setattr(refused_writes.compat, "logger", lambda: logging.getLogger("wooly-test"))
    for _ in range(2):
        error = RuntimeError(ILLEGAL)
        with pytest.raises(RuntimeError) as raised:
            _Worker().execute_model(error)
        assert raised.value is error
        assert "".join(traceback.format_exception(error)).count(refused_writes.NOTE) == 1
    assert [record.getMessage() for record in caplog.records] == [refused_writes.NOTE]


def test_other_errors_and_results_do_not_change(refused_writes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Worker, "execute_model", refused_writes._explaining(_Worker.execute_model))
    assert _Worker().execute_model(None, answer="42") == "42"
    for error in (RuntimeError("CUDA out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            _Worker().execute_model(error)
        assert raised.value is error
        assert not hasattr(error, "__notes__")


def test_every_method_that_waits_for_a_gpu_exists(refused_writes: Any) -> None:
    """A version of vLLM that moves one fails here; installing twice wraps once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = list(refused_writes.compat.methods_that_synchronize())
    before = [vars(owner)[name] for owner, name in places]
    try:
        refused_writes.install()
        wrapped = [vars(owner)[name] for owner, name in places]
        refused_writes.install()
        assert [vars(owner)[name] for owner, name in places] == wrapped
        assert [method.__wrapped__ for method in wrapped] == before
    finally:
        for (owner, name), method in zip(places, before, strict=True):
            setattr(owner, name, method)
