"""Fixtures of the tests with real engines on the CPU."""

from support.engine_fixtures import checkpoint, engine, module_runtime_dir, runtime_dir

__all__ = ["checkpoint", "engine", "module_runtime_dir", "runtime_dir"]
