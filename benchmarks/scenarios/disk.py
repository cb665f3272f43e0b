"""Saving, restoring and verifying whole models, beside reading, copying and writing without wooly.

The model consists of a checkpoint's tensors as they are in its files: on a CPU random bytes in the sizes of a small
Llama (about ``--mib``), with ``--gpu`` the 9.08 GB model of ``python benchmarks model`` (made in ``--model`` if
missing). Files are in the page cache before anything is timed. Needs no vLLM, and on a CPU no torch; on a GPU
cuda-bindings.

    python benchmarks disk [--gpu] [--repeats 5] [--out FILE]

restore_*   from the page cache into the store, blobs verified (and on a CPU verified again by the store), ready for
            engines: ``first`` in a fresh process (on a GPU including its context and pinned buffers), then medians.
            ``command``: the whole ``wooly restore``, from starting Python to its exit.
save_*      from the store to a file system, blobs verified before, ``fsync`` at the end.
verify_*    digests of all resident blobs. ``command``: the whole ``wooly verify``.
open_*      the steps of an engine before it binds: asking the store, with ``WOOLY_VERIFY=attach`` (``verified``) and
            without; ``first``: in a fresh process, whose check on a GPU includes loading kernels.
pread_*     the same number of threads read the same bytes of the same files into reused buffers.
pread_new_* the same into new memory, as any loader's is: its pages are faulted in meanwhile.
memcpy_*    the same number of threads copy host memory, 64 MiB at a time.
write_*     the same number of threads write the same number of bytes, and ``fsync``.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.models import large_llama as llama

from benchmarks.harness.arguments import add_gpu_model, parser
from benchmarks.harness.figures import MIB, seconds
from benchmarks.harness.gpu import first_gpu
from benchmarks.harness.machine import gpu_stack, host, stamp, wooly
from benchmarks.harness.node import Node
from benchmarks.harness.results import RESULTS, gpu_file
from benchmarks.harness.results import write as write_results
from benchmarks.models.saved import describe, random_checkpoint
from benchmarks.scenarios import disk_baselines
from benchmarks.workers.disk import KEY, open_seconds, restore_seconds
from shared_store.disk.save import save_resident
from shared_store.transfer.copier import threads
from shared_store.transfer.resident import committed
from shared_store.transfer.verify import verify


class Rates:
    """Figures by name: seconds and GB/s (10^9 bytes), medians over rounds, with all values."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.numbers: dict[str, Any] = {"disk_model_bytes": nbytes, "disk_threads": threads()}
        self.raw: dict[str, list[float]] = {}

    def put(self, name: str, values: list[float]) -> None:
        """Record durations (seconds) of an operation on the whole model."""
        self.raw[f"{name}_s"] = [round(value, 6) for value in values]
        median = statistics.median(values)
        self.numbers[f"{name}_s"] = round(median, 4)
        self.numbers[f"{name}_gbps"] = round(self.nbytes / median / 1e9, 3)
        print(f"{name}: {median:.3f} s, {self.nbytes / median / 1e9:.2f} GB/s", flush=True)

    def put_ms(self, name: str, values: list[float]) -> None:
        """Record durations (seconds), as milliseconds, of an operation that does not read the whole model."""
        self.raw[f"{name}_ms"] = [round(1e3 * value, 3) for value in values]
        self.numbers[f"{name}_ms"] = round(1e3 * statistics.median(values), 3)
        print(f"{name}: {self.numbers[f'{name}_ms']} ms", flush=True)


@contextmanager
def running_store() -> Iterator[Node]:
    """Start a store without a catalog, which this process's environment names during the block."""
    before = dict(os.environ)
    try:
        with Node("disk-worker") as node:
            os.environ.update(WOOLY_RUNTIME_DIR=str(node.directory), WOOLY_REDIS_URL=f"unix://{node.scratch}/away")
            for variable in ("WOOLY_VERIFY", "WOOLY_CACHE_DIR"):
                os.environ.pop(variable, None)
            node.start()
            yield node
    finally:
        os.environ.clear()
        os.environ.update(before)


def fresh(node: Node, role: str, job: dict[str, Any], **environment: str) -> float:
    """Return the duration that a fresh process reports."""
    child = node.launch(role, role, job, **environment)
    found = float(child.wait("done")["seconds"])
    child.end()
    return found


def command_seconds(*arguments: str) -> float:
    """Return the duration of a whole ``wooly`` command. Exits with its error if it fails."""

    def run() -> None:
        line = [sys.executable, "-m", "shared_store.cli", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"wooly {' '.join(arguments)} failed: {done.stderr}")

    return seconds(run)


def measure(saved: Path, scratch: Path, device: str, repeats: int) -> Rates:
    """Return all figures for the checkpoint files in ``saved``."""
    rates = Rates(describe(saved, KEY, device))
    print(f"{rates.nbytes / 1e9:.2f} GB on {device}, {threads()} threads", flush=True)
    files = sorted(saved.glob("*.safetensors"))
    rates.put("pread", [disk_baselines.pread(files) for _ in range(repeats)])
    rates.put("pread_new", [disk_baselines.pread_new(files) for _ in range(repeats)])
    rates.put("memcpy", [disk_baselines.memcpy(rates.nbytes) for _ in range(repeats)])
    rates.put("write", [disk_baselines.write(scratch / "baseline", rates.nbytes) for _ in range(repeats)])
    with running_store() as node:
        _measure_restore(rates, node, saved, device, repeats)
        _measure_verify(rates, node, repeats)
        _measure_open(rates, node, device, repeats)
        _measure_save(rates, node, scratch / "again", repeats)
    rates.numbers["restore_to_pread_ratio"] = round(rates.numbers["restore_gbps"] / rates.numbers["pread_gbps"], 4)
    return rates


def _measure_restore(rates: Rates, node: Node, saved: Path, device: str, repeats: int) -> None:
    """Restore in fresh and warm processes; the model is in the store afterwards."""
    rates.put("restore_first", [fresh(node, "restore", {"saved": str(saved), "device": device})])
    with node.session() as session:
        took = []
        for _ in range(repeats):
            session.remove(KEY)
            took.append(restore_seconds(saved, device))
        rates.put("restore", took)
        session.remove(KEY)
    rates.put("restore_command", [command_seconds("restore", str(saved))])


def _measure_verify(rates: Rates, node: Node, repeats: int) -> None:
    took = []
    with node.session() as session:
        for _ in range(repeats):
            (found,) = verify(session, session.status().models)
            if found.result != "ok":
                raise SystemExit(f"the restored model does not match its digests: {found}")
            took.append(found.seconds)
    rates.put("verify", took)
    rates.put("verify_command", [command_seconds("verify", "--all")])


def _measure_open(rates: Rates, node: Node, device: str, repeats: int) -> None:
    for check, name in (("never", "open"), ("attach", "open_verified")):
        rates.put_ms(f"{name}_first", [fresh(node, "attach", {"device": device}, WOOLY_VERIFY=check)])
        os.environ["WOOLY_VERIFY"] = check
        rates.put_ms(name, [open_seconds(device) for _ in range(repeats + 1)][1:])
    os.environ.pop("WOOLY_VERIFY")


def _measure_save(rates: Rates, node: Node, target: Path, repeats: int) -> None:
    took = []
    with node.session() as session:
        model = committed(session.status().models, KEY)
        for _ in range(repeats):
            took.append(save_resident(session, model, target).seconds)
            shutil.rmtree(target)
    rates.put("save", took)


def on_gpu(model: Path, repeats: int, out: Path | None) -> None:
    """Measure the 9 GB model on the first visible GPU. Its files are hard links."""
    device = first_gpu()
    llama.run("make", str(model))
    facts = {**host(), **gpu_stack()}
    with tempfile.TemporaryDirectory(prefix="wooly-disk-", dir=model.parent) as name:
        saved = Path(name) / "saved"
        saved.mkdir()
        for file in model.glob("*.safetensors"):
            (saved / file.name).hardlink_to(file)
        rates = measure(saved, Path(name), device, repeats)
    _write(rates, out or gpu_file(facts["gpu"], "disk.json"), facts)


def on_cpu(mib: int, repeats: int, out: Path | None, scratch: Path) -> None:
    """Measure random bytes in host memory."""
    with tempfile.TemporaryDirectory(prefix="wooly-disk-", dir=scratch) as name:
        saved = Path(name) / "saved"
        saved.mkdir()
        random_checkpoint(saved, mib * MIB)
        rates = measure(saved, Path(name), "cpu", repeats)
    _write(rates, out or RESULTS / "disk.json", {**host(), **wooly()})


def _write(rates: Rates, file: Path, facts: dict[str, str]) -> None:
    write_results(file, {"versions": {**stamp(), **facts}, **rates.numbers, "raw": rates.raw})
    print(f"wrote {file}", flush=True)


def main() -> None:
    """Measure, and write the result file."""
    options = parser(__doc__)
    options.add_argument("--gpu", action="store_true", help="measure the 9 GB model on the first NVIDIA GPU")
    add_gpu_model(options)
    options.add_argument("--mib", type=int, default=1024, help="size of the model on a CPU, in MiB (default 1024)")
    options.add_argument(
        "--scratch", type=Path, default=Path("/tmp"), help="directory of the files on a CPU (default /tmp)"
    )
    options.add_argument("--repeats", type=int, default=5, help="rounds of which the median is taken (default 5)")
    options.add_argument(
        "--out", type=Path, help="result file (default benchmarks/results/disk.json, or results/GPU/disk.json)"
    )
    arguments = options.parse_args()
    if arguments.gpu:
        on_gpu(arguments.model, arguments.repeats, arguments.out)
    else:
        on_cpu(arguments.mib, arguments.repeats, arguments.out, arguments.scratch)
