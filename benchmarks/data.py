"""Data loading: the index of a million names, decoded images and the code store, each compared with common practice.

    python -m benchmarks.data [--photographs FOLDER ...] [--names 1000000] [--files 20000] [--records 200000]

Everything is single-threaded. Images are read at 256 px and compared with torchvision's ImageFolder, Resize, CenterCrop
and ToTensor. The code store is compared with pickled int64 records in LMDB. Both sides alternate in the same run. Their
rates are based on CPU time, so that they do not depend on other load, and are the best of several repetitions.
"""

import argparse
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision import datasets, transforms

from benchmarks.interleaved import time_calls
from vqvae2.code_maps import MapSpec
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.images import DataConfig
from vqvae2.data.index import ImageIndex
from vqvae2.data.samplers import MapDataset
from vqvae2.data.sources import open_source
from vqvae2.data.splits import open_datasets

_BATCH = 128


def resident_mib() -> float:
    """Return the resident memory of this process in MiB, without pages mapped from files."""
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def index(names: int, files: int) -> None:
    """Measure scanning a folder of empty files, and an index of synthetic names."""
    with tempfile.TemporaryDirectory() as folder:
        _scan(Path(folder, "images"), Path(folder, "index"), files)
        _index(Path(folder, "index"), names)


def _scan(root: Path, cache: Path, files: int) -> None:
    for number in range(files):
        label = f"n{number // 100:08d}"
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{label}_{number}.JPEG").touch()
    for path in (root, *root.iterdir()):
        os.utime(path, (1, 1))
    os.sync()  # so that writing the files does not slow down the scan
    scan = time_calls(lambda: open_source(str(root))).best
    open_source(str(root), cache)
    cached = time_calls(lambda: open_source(str(root), cache)).best
    print(f"folder of {files:,} files: scan {scan:.2f} s, with a cached index {cached * 1000:.1f} ms")


def _index(cache: Path, names: int) -> None:
    timing = time_calls(lambda: ImageIndex.build([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(names)]))
    timing.value.save(cache)
    size = cache.stat().st_size / 2**20
    # Memory is measured in a new process, where no memory freed earlier is reused.
    code = (
        "import time; from benchmarks.data import resident_mib; from vqvae2.data.index import ImageIndex\n"
        "from pathlib import Path; import sys; before = resident_mib(); t = time.perf_counter()\n"
        "index = ImageIndex.load(Path(sys.argv[1])); t = time.perf_counter() - t\n"
        "parts = index.split(0.01); after = resident_mib()\n"
        "names = list(index.names); print(f'{t * 1000:.1f} {after - before:.1f} {resident_mib() - after:.1f}')"
    )
    load, own, listed = _run_python(code, cache).split()
    print(
        f"index of {names:,} names: built in {timing.best:.2f} s, {size:.0f} MiB on disk; loaded in {load} ms, {own} "
        f"MiB of memory with the split (a Python list of the names: {listed} MiB)"
    )


def _run_python(code: str, path: Path) -> str:
    """Run code in a new Python process with `path` as its argument, and return its output."""
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout


def images(folder: Path, repeats: int) -> None:
    """Measure images per second at 256 px, for this project and torchvision."""
    config = DataConfig(path=str(folder), size=256, num_workers=0, val_fraction=1e-9)
    ours, _ = open_datasets(config)
    steps = [transforms.Resize(256), transforms.CenterCrop(256), transforms.ToTensor()]
    files = [folder / name for name in ours.names]
    with tempfile.TemporaryDirectory() as links:
        Path(links, "all").mkdir()
        for number, file in enumerate(files):
            Path(links, "all", f"{number:06d}{file.suffix}").symlink_to(file.resolve())
        theirs = datasets.ImageFolder(links, transforms.Compose(steps))
        count = min(len(files), 400)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for name, data in (("ours", ours), ("theirs", theirs)):
                times[name].append(time_calls(lambda data=data: _read(data, count), clock=time.process_time).best)
    first, second = (count / min(seconds) for seconds in times.values())
    print(f"{folder.name}: {first:.0f} images/s, ImageFolder {second:.0f} images/s: speedup {first / second:.2f}×")


def _read(data: MapDataset, count: int) -> None:
    for number in range(count):
        data[number]


def codes(records: int, repeats: int) -> None:
    """Measure the code store with (32², 64²) maps of 512 codes: size, read rate and memory."""
    with tempfile.TemporaryDirectory() as folder:
        count, ours, theirs = 4096, Path(folder, "ours"), Path(folder, "theirs")
        _write_both(count, ours, theirs)
        times: dict[str, list[float]] = {"read_store": [], "read_pickles": []}
        for _ in range(repeats):
            # Each reader runs in a new process, as in training, so that its memory does not slow down the other.
            for name, path in (("read_store", ours), ("read_pickles", theirs)):
                output = _run_python(f"import sys; from benchmarks.data import {name}; {name}(sys.argv[1])", path)
                times[name].append(float(output))
        first, second = (count / min(seconds) for seconds in times.values())
        print(
            f"code store: {first:,.0f} records/s in batches of {_BATCH}, pickled {second:,.0f} records/s: speedup "
            f"{first / second:.1f}×"
        )
        _memory(Path(folder, "many"), records)
        _opening(Path(folder, "million"))


def _write_both(count: int, ours: Path, theirs: Path) -> None:
    """Write the same random codes to a code store and as pickled int64 records; print the ratio of the sizes."""
    rng = np.random.default_rng(0)
    header = _header(count, (64, 32))
    writer, other = CodeWriter(ours, header), lmdb.open(str(theirs), map_size=2**30)
    for number in writer.missing_values():
        maps = [rng.integers(0, 512, (RECORDS_PER_VALUE, level.height, level.width)) for level in header.levels]
        names = [f"n01440764/n01440764_{number * RECORDS_PER_VALUE + index}.JPEG" for index in range(RECORDS_PER_VALUE)]
        writer.write(number, [torch.from_numpy(level) for level in maps], torch.zeros(RECORDS_PER_VALUE), names)
        with other.begin(write=True) as transaction:
            for index, name in enumerate(names):
                record = (maps[1][index], maps[0][index], name)
                transaction.put(str(number * RECORDS_PER_VALUE + index).encode(), pickle.dumps(record))
    writer.finish()
    ratio = lmdb_environment.open_reader(ours).info()["last_pgno"] / other.info()["last_pgno"]
    other.close()
    print(f"code store: {ratio:.3f} × the size of pickled int64 records")


def _order(count: int) -> list[list[int]]:
    return np.random.default_rng(1).permutation(count).reshape(-1, _BATCH).tolist()


def read_store(path: str) -> None:
    """Print the shortest CPU time of five passes over a code store; run by `codes` in a new process."""
    torch.set_num_threads(1)
    store = CodeStore.open(Path(path))
    order = _order(len(store))

    def read_all_batches() -> None:
        for numbers in order:
            store.__getitems__(numbers)

    print(time_calls(read_all_batches, 5, time.process_time).best)


def read_pickles(path: str) -> None:
    """Print the shortest CPU time of five passes over pickled records, collated as by a DataLoader."""
    torch.set_num_threads(1)
    environment = lmdb.open(path, readonly=True, lock=False)

    def item(number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        with environment.begin() as transaction:
            # Common in other implementations. This project never unpickles; these records were written above.
            top, bottom, name = pickle.loads(transaction.get(str(number).encode()) or b"")
        return torch.from_numpy(top), torch.from_numpy(bottom), name

    def read_all_batches() -> None:
        for numbers in order:
            default_collate([item(number) for number in numbers])

    order = _order(environment.stat()["entries"])
    print(time_calls(read_all_batches, 5, time.process_time).best)


def _header(count: int, sides: tuple[int, ...]) -> CodeHeader:
    levels = tuple(MapSpec(codebook_size=512, height=side, width=side) for side in sides)
    return CodeHeader(levels=levels, count=count, split="train", source="synthetic", autoencoder="0" * 64)


def _fill(path: Path, header: CodeHeader) -> None:
    """Write a store of random codes with few transactions."""
    writer = CodeWriter(path, header)
    environment, rng = writer.environment, np.random.default_rng(0)
    for first in range(0, header.count, 64 * RECORDS_PER_VALUE):
        entries = []
        for start in range(first, min(first + 64 * RECORDS_PER_VALUE, header.count), RECORDS_PER_VALUE):
            block = np.zeros(min(RECORDS_PER_VALUE, header.count - start), header.record_dtype)
            for name in header.record_dtype.fields or ():
                if name != "label":
                    block[name] = rng.integers(0, 512, block[name].shape, np.uint16)
            entries.append(((start // RECORDS_PER_VALUE).to_bytes(8, "big"), block.tobytes()))
        lmdb_environment.put(environment, entries)
    writer.finish()


def _memory(path: Path, records: int) -> None:
    """Measure memory and time of reading every record once in shuffled batches, in a new process."""
    _fill(path, _header(records, (64, 32)))
    output = _run_python("import sys; from benchmarks.data import read_all; read_all(sys.argv[1])", path)
    memory, seconds = output.split()
    print(f"code store of {records:,} records: reading all of them takes {memory} MiB of memory and {seconds} s")


def read_all(path: str) -> None:
    """Print the increase in memory in MiB and the time in seconds; run by `_memory` in a new process."""
    torch.set_num_threads(1)
    before, peak = resident_mib(), 0.0
    started = time.perf_counter()
    store = CodeStore.open(Path(path))
    count = len(store) // _BATCH
    order = np.random.default_rng(1).permutation(count * _BATCH).reshape(count, _BATCH)
    for step, numbers in enumerate(order):
        batch = store.__getitems__(numbers.tolist())
        if step % 100 == 0:
            peak = max(peak, resident_mib())
        del batch
    print(f"{peak - before:.0f} {time.perf_counter() - started:.1f}")


def _opening(path: Path) -> None:
    _fill(path, _header(10**6, (4, 2)))
    lmdb_environment.close_reader(path)
    seconds = time_calls(lambda: CodeStore.open(path).read([999_999])).best
    print(f"code store of 1,000,000 records: opened and one record read in {seconds * 1000:.1f} ms")


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of photographs")
    parser.add_argument("--names", type=int, default=10**6)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    index(options.names, options.files)
    for folder in options.photographs:
        images(folder, options.repeats)
    codes(options.records, options.repeats)


if __name__ == "__main__":
    main()
