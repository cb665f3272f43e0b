"""Saving, restoring and verifying whole models, beside what the machine's memory and disk do by themselves.

The model is a checkpoint's tensors as they are in its files: on a CPU random bytes in the sizes of a small Llama (about
``--mib``), with ``--gpu`` the 9.08 GB model of ``gpu_model.py`` (made in ``--model`` if nothing is there). Files are in
the page cache before anything is timed. Needs no vLLM, and on a CPU no torch; on a GPU cuda-bindings and CuPy.

    python benchmarks/bench_disk.py [--gpu] [--repeats 5] [--out FILE]

restore_*   from the page cache into the store, blobs checked (and on a CPU checked again by the store), ready for
            engines: ``first`` in a fresh process (on a GPU with making its context and pinning buffers), then medians.
            ``command``: the whole ``wooly restore``, from starting Python to its end.
save_*      from the store to a file system, blobs checked before, on the disk (``fsync``) in the end.
verify_*    digests of all that is resident. ``command``: the whole ``wooly verify``.
open_*      what an engine does before it binds: asking the store, with ``WOOLY_VERIFY=attach`` (``verified``) and
            without; ``first``: in a fresh process, whose check on a GPU begins with importing CuPy and loading kernels.
pread_*     as many threads read the same bytes of the same files into buffers that they use again.
pread_new_* the same into memory that is new, as that of any loader is: its pages are made meanwhile.
memcpy_*    as many threads copy memory of the host, 64 MiB at a time.
write_*     as many threads write the same number of bytes, and ``fsync``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_gpu

import shared_store
from shared_store.base import manifest as manifests
from shared_store.base.digest import digest
from shared_store.base.manifest import Blob, Manifest, TensorEntry
from shared_store.client.session import Session
from shared_store.disk.description import DESCRIPTION, Description, SavedBlob, SavedFile, encode
from shared_store.disk.obtain import Need, obtain
from shared_store.disk.restore import restore_resident
from shared_store.disk.save import save_resident
from shared_store.disk.saved import SavedModel
from shared_store.memory import backend_for
from shared_store.protocol import wire
from shared_store.transfer.copier import PIECE_BYTES, threads
from shared_store.transfer.resident import committed
from shared_store.transfer.verify import verify

HERE = Path(__file__).resolve().parent
KEY = f"{1:064x}"
MIB = 1 << 20


def random_checkpoint(directory: Path, nbytes: int) -> None:
    """A safetensors file of random bytes: matrices of 2 to 16 MiB, and a norm of 8 KiB after every seventh."""
    header: dict[str, Any] = {}
    end = 0
    sizes = [4 * MIB, 2 * MIB, 2 * MIB, 4 * MIB, 16 * MIB, 16 * MIB, 16 * MIB, 8192]
    while end < nbytes:
        size = sizes[len(header) % len(sizes)]
        name = f"layers.{len(header) // len(sizes)}.{len(header) % len(sizes)}.weight"
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            first, last = entry["data_offsets"]
            file.write(os.urandom(last - first))


def describe(directory: Path, device: str) -> int:
    """Make a saved model of the checkpoint files in a directory; bytes of its tensors. They enter the page cache."""
    files: list[SavedFile] = []
    places: dict[bytes, SavedBlob] = {}
    blobs: list[Blob] = []
    names: list[str] = []
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:begin])
            header.pop("__metadata__", None)
            files.append(SavedFile(path.name, len(content), begin, digest(content[:begin]).hex()))
            spans = [(begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]) for entry in header.values()]
            with ThreadPoolExecutor(threads()) as pool, memoryview(content) as view:
                found = list(pool.map(lambda span: _digest(view, *span), spans))
        for name, (first, last), one in zip(header, spans, found, strict=True):
            if one in places:
                raise SystemExit(f"{name} equals another tensor; the benchmark needs distinct ones")
            places[one] = SavedBlob(one.hex(), last - first, number, first)
            blobs.append(Blob(one, last - first))
            names.append(name)
    tensors = tuple(
        TensorEntry("", name, "parameter", index, "uint8", (blob.nbytes,), (1,), 0, index)
        for index, (name, blob) in enumerate(zip(names, blobs, strict=True))
    )
    manifest = Manifest(key=KEY, name="bench", engine="bench", device=device, blobs=tuple(blobs), tensors=tensors)
    description = Description(
        wooly=shared_store.__version__,
        saved_at=time.time(),
        key=KEY,
        name="bench",
        engine="bench",
        device=device,
        files=tuple(files),
        blobs=tuple(places.values()),
        manifest=manifests.encode(manifest),
    )
    (directory / DESCRIPTION).write_bytes(encode(description))
    return manifest.nbytes


def _digest(view: memoryview, first: int, last: int) -> bytes:
    with view[first:last] as part:
        return digest(part)


class Rates:
    """Figures: seconds and GB/s (10^9) by name, medians over rounds, with every value."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.numbers: dict[str, Any] = {"disk_model_bytes": nbytes, "disk_threads": threads()}
        self.raw: dict[str, list[float]] = {}

    def put(self, name: str, seconds: list[float]) -> None:
        """Seconds of the rounds of something that takes all of the model."""
        self.raw[f"{name}_s"] = [round(value, 6) for value in seconds]
        median = statistics.median(seconds)
        self.numbers[f"{name}_s"] = round(median, 4)
        self.numbers[f"{name}_gbps"] = round(self.nbytes / median / 1e9, 3)
        print(f"{name}: {median:.3f} s, {self.nbytes / median / 1e9:.2f} GB/s", flush=True)

    def put_ms(self, name: str, seconds: list[float]) -> None:
        """Milliseconds of something whose rate means nothing."""
        self.raw[f"{name}_ms"] = [round(1e3 * value, 3) for value in seconds]
        self.numbers[f"{name}_ms"] = round(1e3 * statistics.median(seconds), 3)
        print(f"{name}: {self.numbers[f'{name}_ms']} ms", flush=True)


@contextmanager
def store() -> Iterator[Path]:
    """A store of its own, in a directory of its own; ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="wooly-", dir="/tmp") as name:
        directory = Path(name)
        os.environ.update(WOOLY_RUNTIME_DIR=name, WOOLY_REDIS_URL=f"unix://{directory}/away")
        for variable in ("WOOLY_VERIFY", "WOOLY_CACHE_DIR"):
            os.environ.pop(variable, None)
        try:
            Session.connect(directory, autostart=True).close()
            yield directory
        finally:
            with Session.connect(directory, autostart=False) as session:
                pid = os.pidfd_open(session.store_pid)
                session.shutdown_store()
            select.select([pid], [], [], 30)
            os.close(pid)


def seconds(act: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def restore_once(saved: Path, device: str) -> float:
    """Bring the model into the store; it stays there."""
    with Session.connect(autostart=False) as session:
        began = time.perf_counter()
        with SavedModel(saved) as opened:
            found = restore_resident(session, opened, device)
        if found.result != "restored":
            raise SystemExit("the model was in the store already: nothing was measured")
        return time.perf_counter() - began


def remove() -> None:
    """Take the model out of the store."""
    with Session.connect(autostart=False) as session:
        session.remove(KEY)


def attach_once(device: str) -> float:
    """Ask for the model as an engine does, with the check that the environment wants."""
    backend = backend_for(device)
    with Session.connect(autostart=False) as session:
        began = time.perf_counter()
        opened = obtain(session, Need(KEY, "bench", "bench", publish=False, timeout_s=60), backend)
        took = time.perf_counter() - began
        if opened is not None:
            wire.close_fds(opened[1])
        return took


def fresh(*arguments: str, **environment: str) -> float:
    """Seconds that a fresh process of this script says."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    return float(done.stdout.strip().splitlines()[-1])


def command(*arguments: str) -> float:
    """Seconds of a whole ``wooly`` command."""
    line = [sys.executable, "-m", "shared_store.cli", *arguments]
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"wooly {' '.join(arguments)} failed: {done.stderr}")
    return time.perf_counter() - began


def baselines(rates: Rates, saved: Path, scratch: Path, repeats: int) -> None:
    """What the machine does without us."""
    pieces = [
        (file.fd, offset, min(PIECE_BYTES, size - offset))
        for file, size in _open_files(saved)
        for offset in range(0, size, PIECE_BYTES)
    ]
    rates.put("pread", [_in_threads(pieces, _pread) for _ in range(repeats)])
    rates.put("pread_new", [_read_into_new_memory(pieces) for _ in range(repeats)])
    rates.put("memcpy", [_memcpy(rates.nbytes) for _ in range(repeats)])
    target = scratch / "baseline"
    took = []
    for _ in range(repeats):
        fd = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
        os.posix_fallocate(fd, 0, rates.nbytes)
        steps = [(fd, at, min(PIECE_BYTES, rates.nbytes - at)) for at in range(0, rates.nbytes, PIECE_BYTES)]
        began = time.perf_counter()
        _in_threads(steps, _pwrite)
        os.fsync(fd)
        took.append(time.perf_counter() - began)
        os.close(fd)
        target.unlink()
    rates.put("write", took)


def _open_files(saved: Path) -> list[tuple[Any, int]]:
    opened = SavedModel(saved)  # open until the process ends
    return [(file, os.fstat(file.fd).st_size) for file in opened.files]


def _in_threads(pieces: list[tuple[int, int, int]], act: Callable[[bytearray, int, int, int], None]) -> float:
    count = threads()

    def work(number: int) -> None:
        buffer = bytearray(os.urandom(4096) * (PIECE_BYTES // 4096))
        for piece in pieces[number::count]:
            act(buffer, *piece)

    with ThreadPoolExecutor(count) as pool:
        return seconds(lambda: list(pool.map(work, range(count))))


def _pread(buffer: bytearray, fd: int, offset: int, nbytes: int) -> None:
    os.preadv(fd, [memoryview(buffer)[:nbytes]], offset)


def _read_into_new_memory(pieces: list[tuple[int, int, int]]) -> float:
    count = threads()
    starts = [0]
    for _, _, nbytes in pieces:
        starts.append(starts[-1] + nbytes)

    def work(number: int) -> None:
        for (fd, offset, nbytes), at in zip(pieces[number::count], starts[number::count], strict=False):
            os.preadv(fd, [view[at : at + nbytes]], offset)

    with mmap.mmap(-1, starts[-1]) as memory, memoryview(memory) as view, ThreadPoolExecutor(count) as pool:
        return seconds(lambda: list(pool.map(work, range(count))))


def _pwrite(buffer: bytearray, fd: int, offset: int, nbytes: int) -> None:
    os.pwritev(fd, [memoryview(buffer)[:nbytes]], offset)


def _memcpy(nbytes: int) -> float:
    count, step = threads(), 64 * MIB
    buffers = [(ctypes.create_string_buffer(step), ctypes.create_string_buffer(step)) for _ in range(count)]
    for source, target in buffers:  # touched, so that no page is new
        ctypes.memset(source, 1, step)
        ctypes.memset(target, 2, step)
    times = nbytes // step

    def work(number: int) -> None:
        source, target = buffers[number]
        for _ in range(number, times, count):
            ctypes.memmove(target, source, step)

    with ThreadPoolExecutor(count) as pool:
        took = seconds(lambda: list(pool.map(work, range(count))))
    return took * nbytes / (times * step)


def measure(saved: Path, scratch: Path, device: str, repeats: int) -> Rates:
    """All figures."""
    rates = Rates(describe(saved, device))
    print(f"{rates.nbytes / 1e9:.2f} GB on {device}, {threads()} threads", flush=True)
    baselines(rates, saved, scratch, repeats)
    with store():
        rates.put("restore_first", [fresh("--restore", str(saved), "--device", device)])
        took = []
        for _ in range(repeats):
            remove()
            took.append(restore_once(saved, device))
        rates.put("restore", took)
        remove()
        rates.put("restore_command", [command("restore", str(saved))])

        with Session.connect(autostart=False) as session:
            took = []
            for _ in range(repeats):
                (found,) = verify(session, session.status().models)
                if found.result != "ok":
                    raise SystemExit(f"the model is not what was restored: {found}")
                took.append(found.seconds)
            rates.put("verify", took)
            rates.put("verify_command", [command("verify", "--all")])
            for check in ("never", "attach"):
                name = "open_verified" if check == "attach" else "open"
                rates.put_ms(f"{name}_first", [fresh("--attach", "--device", device, WOOLY_VERIFY=check)])
                os.environ["WOOLY_VERIFY"] = check
                rates.put_ms(name, [attach_once(device) for _ in range(repeats + 1)][1:])
            os.environ.pop("WOOLY_VERIFY")
            model = committed(session.status().models, KEY)
            took = []
            for _ in range(repeats):
                took.append(save_resident(session, model, scratch / "again").seconds)
                shutil.rmtree(scratch / "again")
            rates.put("save", took)
    rates.numbers["restore_to_pread_ratio"] = round(rates.numbers["restore_gbps"] / rates.numbers["pread_gbps"], 4)
    return rates


def write(rates: Rates, out: Path, facts: dict[str, str]) -> None:
    """The result file."""
    stamp = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": bench_gpu.commit()}
    result = {"versions": {**stamp, **facts}, **rates.numbers, "raw": rates.raw}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}", flush=True)


def cpu_facts() -> dict[str, str]:
    """The machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "wooly": shared_store.__version__,
    }


def on_gpu(model: Path, repeats: int, out: Path | None) -> None:
    """The 9 GB model, on the first GPU that this process sees. Its files are linked, not copied."""
    from shared_store.memory.cuda.driver import visible_gpus

    device = next(iter(visible_gpus()), None)
    if device is None:
        raise SystemExit("this benchmark needs an NVIDIA GPU and cuda-bindings: see `wooly doctor`")
    subprocess.run([sys.executable, str(HERE / "gpu_model.py"), "make", str(model)], check=True)
    facts = {**cpu_facts(), **bench_gpu.versions()}
    with tempfile.TemporaryDirectory(prefix="wooly-disk-", dir=model.parent) as name:
        saved = Path(name) / "saved"
        saved.mkdir()
        for file in model.glob("*.safetensors"):
            (saved / file.name).hardlink_to(file)
        rates = measure(saved, Path(name), device, repeats)
    write(rates, out or HERE / "results" / bench_gpu.machine(facts["gpu"]) / "disk.json", facts)


def on_cpu(mib: int, repeats: int, out: Path | None, scratch: Path) -> None:
    """Random bytes in the host's memory."""
    with tempfile.TemporaryDirectory(prefix="wooly-disk-", dir=scratch) as name:
        saved = Path(name) / "saved"
        saved.mkdir()
        random_checkpoint(saved, mib * MIB)
        rates = measure(saved, Path(name), "cpu", repeats)
    write(rates, out or HERE / "results" / "disk.json", cpu_facts())


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the 9 GB model on a GPU")
    parser.add_argument(
        "--model", type=Path, default=Path("/tmp/wooly-bench-model"), help="with --gpu; made if missing"
    )
    parser.add_argument("--mib", type=int, default=1024, help="without --gpu: size of the model")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), help="without --gpu: where files go")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/disk.json, or results/GPU/disk.json")
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)  # what a fresh process is started for
    parser.add_argument("--attach", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.restore:
        print(restore_once(arguments.restore, arguments.device))
    elif arguments.attach:
        print(attach_once(arguments.device))
    elif arguments.gpu:
        on_gpu(arguments.model, arguments.repeats, arguments.out)
    else:
        on_cpu(arguments.mib, arguments.repeats, arguments.out, arguments.scratch)


if __name__ == "__main__":
    main()
