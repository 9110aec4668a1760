"""The command `vqvae2 diagnose`: which part of a run makes its samples worse than its data.

Held-out images with all their codes true, with only the coarsest levels true, and with every level sampled: what first
looks wrong was made by the part that this row adds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sampling.masks import keep_coarsest
from sampling.params import SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.report.run_status import read_run
from vqvae2 import files
from vqvae2.code_maps import CodeMaps
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import to_uint8
from vqvae2.errors import UserError
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.run_folder import RunFolder

_COLUMNS = 8


def diagnose_run(run: Path, count: int = 16, seed: int = 0) -> Path:
    """Write the diagnostic pictures of the first `count` held-out images into RUN/diagnosis; that folder.

    It holds a grid for each row of `rows`, `diagnosis.png` with the rows under each other, and `diagnosis.json`, which
    names them. It is written at once or not at all; pictures of other settings or weights are replaced, those of these
    kept. On several processes the first one does the work.
    """
    process = processes()
    folder = RunFolder.existing(run)
    out = folder.path / "diagnosis"
    if process.is_main_process:
        _diagnose(folder, out, count, seed, process.device or "cpu")
    process.wait_for_everyone()
    return out


def rows(
    pipeline: VQVAE2Pipeline, codes: CodeMaps, labels: Int[Tensor, " b"] | None, seed: int, first: int = 0
) -> dict[str, Tensor]:
    """The codes' images (B, C, H, W), uint8, by name: `reconstruction` with all levels true, `true-LEVEL` with that
    level and the coarser ones true and the finer ones sampled, and `sampled` with no level true.

    `first` is the number of the first image, on which its noise depends.
    """
    images = range(first, first + len(codes[0]))
    found = {"reconstruction": codes}
    for kept in reversed(range(len(codes))):
        name = f"true-{pipeline.levels[-kept]}" if kept else "sampled"
        found[name] = pipeline.sample_codes(images, labels, seed, SamplingParams(), keep_coarsest(codes, kept))
    return {name: to_uint8(pipeline.autoencoder.decode(maps)).cpu() for name, maps in found.items()}


def _diagnose(folder: RunFolder, out: Path, count: int, seed: int, device: torch.device | str) -> None:
    if count < 1 or seed < 0:
        raise UserError(f"--count {count}, --seed {seed}: expected at least one image and a seed of at least 0")
    pipeline = VQVAE2Pipeline.load(folder.path, device)
    store = CodeStore.open(folder.code_store("val"))
    store.header.check_autoencoder(pipeline.autoencoder.digest, store.path)
    count = min(count, len(store))
    record: dict[str, Any] = {
        "count": count,
        "seed": seed,
        "rows": [],
        "autoencoder": pipeline.autoencoder.digest,
        "priors": [prior.digest for prior in pipeline.priors],
        "torch": torch.__version__,
    }
    found = files.read_json(out / "diagnosis.json") if (out / "diagnosis.json").is_file() else {}
    if found | {"rows": []} == record:
        return
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, count, pipeline.batch_size):
        batch = store.read(range(start, min(start + pipeline.batch_size, count)))
        codes = tuple(level.to(device) for level in batch.codes)
        labels = batch.label.to(device) if pipeline.classes else None
        for name, images in rows(pipeline, codes, labels, seed, start).items():
            parts.setdefault(name, []).append(images)
    pictures = {name: torch.cat(images) for name, images in parts.items()}
    with files.atomic_write(out) as partial:
        for name, images in pictures.items():
            save_grid(partial / f"{name}.png", images, columns=min(_COLUMNS, count))
        save_grid(partial / "diagnosis.png", *interleave_rows(*pictures.values(), columns=_COLUMNS))
        files.write_json(partial / "diagnosis.json", record | {"rows": list(pictures)})


def main(arguments: list[str]) -> None:
    """The command `vqvae2 diagnose`."""
    parser = argparse.ArgumentParser(
        prog="vqvae2 diagnose", description="Show whether the autoencoder or which prior makes samples look wrong."
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--count", type=int, default=16, help="how many held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled")
    options = parser.parse_args(arguments)
    out = diagnose_run(options.run, options.count, options.seed)
    if processes().is_main_process:
        print(f"{out / 'diagnosis.png'}\nrows: {', '.join(files.read_json(out / 'diagnosis.json')['rows'])}")
        for warning in read_run(RunFolder(options.run)).warnings:
            print(f"warning: {warning}")
