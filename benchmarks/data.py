"""How fast data arrives: the index of a million names, decoded images, and the code store; each beside what is usual.

    python -m benchmarks.data [--photographs FOLDER ...] [--names 1000000] [--files 20000] [--records 200000]

Everything is single-threaded, in this process. Images are read at 256 px against torchvision's ImageFolder + Resize +
CenterCrop + ToTensor, the code store against pickled int64 records in LMDB, in turns in the same run. These rates count
processor time, so that they are those of one core whatever else runs, and are the best of some repetitions.
"""

import argparse
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision import datasets, transforms

from vqvae2.code_maps import MapSpec
from vqvae2.data import lmdb_store
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.images import DataConfig, ImageDataset, open_datasets
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources import open_source

_BATCH = 128


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def core_seconds(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def resident() -> float:
    """MiB of memory that are this process's own, without pages mapped from files."""
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def index(names: int, files: int) -> None:
    """Time and memory of an index of synthetic names, and of a scan of empty files."""
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "images"), Path(folder, "index")
        for number in range(files):
            if number % 100 == 0:
                where = root / f"n{number // 100:08d}"
                where.mkdir(parents=True)
            (where / f"n{number // 100:08d}_{number}.JPEG").touch()
        for path in (root, *root.iterdir()):
            os.utime(path, (1, 1))
        os.sync()  # what made the files is not part of the scan
        scan = seconds(lambda: open_source(str(root)))
        open_source(str(root), cache)
        again = seconds(lambda: open_source(str(root), cache))
        print(f"folder of {files:,} files: scan {scan:.2f} s, with its index {again * 1000:.1f} ms")
        started = time.perf_counter()
        built = ImageIndex.build([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(names)])
        taken = time.perf_counter() - started
        built.save(cache)
        size = cache.stat().st_size / 2**20
        del built
        # In a process of its own, where no freed memory hides what is taken.
        code = (
            "import time; from benchmarks.data import resident; from vqvae2.data.index import ImageIndex\n"
            "from pathlib import Path; import sys; before = resident(); t = time.perf_counter()\n"
            "index = ImageIndex.load(Path(sys.argv[1])); t = time.perf_counter() - t\n"
            "parts = index.split(0.01); after = resident()\n"
            "names = list(index.names); print(f'{t * 1000:.1f} {after - before:.1f} {resident() - after:.1f}')"
        )
        found = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True)
        load, own, listed = found.stdout.split()
        print(
            f"index of {names:,} names: made in {taken:.2f} s, {size:.0f} MiB on disk; loaded in {load} ms, {own} MiB "
            f"of memory with the split (a Python list of the names: {listed} MiB)"
        )


def images(folder: Path, repeats: int) -> None:
    """Images a second at 256 px, ours and torchvision's."""
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
            times["ours"].append(core_seconds(lambda: _read(ours, count)))
            times["theirs"].append(core_seconds(lambda: [theirs[number] for number in range(count)]))
    first, second = (count / min(taken) for taken in times.values())
    print(f"{folder.name}: {first:.0f} images/s, ImageFolder {second:.0f}: {first / second:.2f} × as fast")


def _read(data: ImageDataset, count: int) -> None:
    for number in range(count):
        data[number]


def codes(records: int, repeats: int) -> None:
    """Bytes and read rate of (32², 64²) maps of 512 codes against pickled int64 records, and memory of reading."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        count, ours, theirs = 4096, Path(folder, "ours"), Path(folder, "theirs")
        header = _header(count, (64, 32))
        writer, other = CodeWriter(ours, header), lmdb.open(str(theirs), map_size=2**30)
        for number in writer.missing_values():
            maps = [rng.integers(0, 512, (RECORDS_PER_VALUE, level.height, level.width)) for level in header.levels]
            names = [f"n01440764/n01440764_{number * RECORDS_PER_VALUE + at}.JPEG" for at in range(RECORDS_PER_VALUE)]
            writer.write(number, [torch.from_numpy(level) for level in maps], torch.zeros(RECORDS_PER_VALUE), names)
            with other.begin(write=True) as transaction:
                for at, name in enumerate(names):
                    row = (maps[1][at], maps[0][at], name)
                    transaction.put(str(number * RECORDS_PER_VALUE + at).encode(), pickle.dumps(row))
        writer.finish()
        pages = lmdb_store.open_reader(ours).info()["last_pgno"] / other.info()["last_pgno"]
        other.close()
        print(f"code store: {pages:.3f} of the bytes of pickled int64 records")
        times: dict[str, list[float]] = {"read_store": [], "read_pickles": []}
        for _ in range(repeats):
            for name, taken in times.items():  # a process each, as training has: one's memory does not slow the other
                path = ours if name == "read_store" else theirs
                code = f"import sys; from benchmarks.data import {name}; {name}(sys.argv[1])"
                found = subprocess.run(
                    [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
                )
                taken.append(float(found.stdout))
        first, second = (count / min(taken) for taken in times.values())
        print(
            f"code store: {first:,.0f} records/s in batches of {_BATCH}, pickled {second:,.0f}: {first / second:.1f} ×"
        )
        _memory(Path(folder, "many"), records)
        _opening(Path(folder, "million"))


def _order(count: int) -> list[list[int]]:
    return np.random.default_rng(1).permutation(count).reshape(-1, _BATCH).tolist()


def read_store(path: str) -> None:
    """Print the least time of some passes over a code store."""
    torch.set_num_threads(1)
    store = CodeStore.open(Path(path))
    order = _order(len(store))
    print(min(core_seconds(lambda: [store.__getitems__(numbers) and None for numbers in order]) for _ in range(5)))


def read_pickles(path: str) -> None:
    """Print the least time of some passes over pickled records, collated as a data loader does."""
    torch.set_num_threads(1)
    environment = lmdb.open(path, readonly=True, lock=False)

    def item(number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        with environment.begin() as transaction:
            # What other implementations do, and this project never does; these were written above.
            top, bottom, name = pickle.loads(transaction.get(str(number).encode()))
        return torch.from_numpy(top), torch.from_numpy(bottom), name

    def everything() -> None:
        for numbers in order:
            default_collate([item(number) for number in numbers])

    order = _order(environment.stat()["entries"])
    print(min(core_seconds(everything) for _ in range(5)))


def _header(count: int, sides: tuple[int, ...]) -> CodeHeader:
    levels = tuple(MapSpec(codebook_size=512, height=side, width=side) for side in sides)
    return CodeHeader(levels=levels, count=count, split="train", source="synthetic", autoencoder="0" * 64)


def _fill(path: Path, header: CodeHeader) -> None:
    """A store of random codes, written with few transactions."""
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
        lmdb_store.put(environment, entries)
    writer.finish()


def _memory(path: Path, records: int) -> None:
    """Memory and time of reading every record once, in shuffled batches, by a process of its own."""
    _fill(path, _header(records, (64, 32)))
    code = "import sys; from benchmarks.data import read_all; read_all(sys.argv[1])"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    more, taken = found.stdout.split()
    print(f"code store of {records:,} records: {more} MiB more memory while all are read, {taken} s")


def read_all(path: str) -> None:
    """What `_memory` runs: the most memory taken above that at the start, in MiB, and the time in seconds."""
    torch.set_num_threads(1)
    before, most = resident(), 0.0
    started = time.perf_counter()
    store = CodeStore.open(Path(path))
    count = len(store) // _BATCH
    order = np.random.default_rng(1).permutation(count * _BATCH).reshape(count, _BATCH)
    for step, numbers in enumerate(order):
        batch = store.__getitems__(numbers.tolist())
        if step % 100 == 0:
            most = max(most, resident())
        del batch
    print(f"{most - before:.0f} {time.perf_counter() - started:.1f}")


def _opening(path: Path) -> None:
    _fill(path, _header(10**6, (4, 2)))
    lmdb_store.close_reader(path)
    taken = seconds(lambda: CodeStore.open(path).read([999_999]))
    print(f"code store of 1,000,000 records: opened, one record read, in {taken * 1000:.1f} ms")


def main() -> None:
    """Print one line a measurement."""
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
