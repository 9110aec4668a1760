"""The command `vqvae2 diagnose`: show whether the autoencoder or a prior causes the artifacts in a run's samples.

It decodes held-out images with all levels taken from the encoder, with only the coarsest levels taken from it, and with
every level sampled. The first row with artifacts identifies the network that causes them.
"""

from pathlib import Path

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from tyro.conf import Positional

from sampling.masks import keep_coarsest
from sampling.params import SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.report.diagnosis import Diagnosis, diagnosis_path, read_diagnosis
from sampling.report.run_status import read_run
from vqvae2 import files
from vqvae2.code_maps import CodeMaps
from vqvae2.command_line import Options
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import to_uint8
from vqvae2.errors import UserError
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.run_folder import RunFolder

_COLUMNS = 8


class DiagnoseOptions(Options):
    """Show whether the autoencoder or one of the priors limits the quality of the samples."""

    run: Positional[Path] = Field(description="run folder")
    count: int = Field(default=16, ge=1, le=2**16, description="number of held-out images")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the sampled codes")


def diagnose_run(run: Path, count: int = 16, seed: int = 0) -> Path:
    """Write diagnostic images of the first `count` held-out images to RUN/diagnosis, and return that folder.

    It holds one grid per row of `diagnostic_rows`, `diagnosis.png` with all rows, and `diagnosis.json` with their
    names. The folder is written atomically, and is replaced if it was made with other settings or weights. Only the
    main process does the work.

    Raises:
        UserError: If `count` or `seed` is out of range, or a network or the code store is missing.
    """
    process = processes()
    folder = RunFolder.existing(run)
    out = folder.path / "diagnosis"
    if process.is_main_process:
        _diagnose(folder, out, count, seed, process.device or "cpu")
    process.wait_for_everyone()
    return out


def diagnostic_rows(
    pipeline: VQVAE2Pipeline, codes: CodeMaps, labels: Int[Tensor, " b"] | None, seed: int, first: int = 0
) -> dict[str, Tensor]:
    """Decode images with more and more of their levels sampled.

    Returns uint8 images (B, C, H, W) by name: `reconstruction` uses the given codes on all levels, `true-LEVEL` uses
    them on that level and the coarser ones and samples the finer ones, and `sampled` samples every level. `first` is
    the index of the first image, which determines the sampling noise.
    """
    images = range(first, first + len(codes[0]))
    codes_of_row = {"reconstruction": codes}
    for kept in reversed(range(len(codes))):
        name = f"true-{pipeline.levels[-kept]}" if kept else "sampled"
        known = keep_coarsest(codes, kept) if kept else ()
        codes_of_row[name] = pipeline.sample_codes(images, labels, seed, SamplingParams(), known)
    return {name: to_uint8(pipeline.autoencoder.decode(maps)).cpu() for name, maps in codes_of_row.items()}


def _diagnose(folder: RunFolder, out: Path, count: int, seed: int, device: torch.device | str) -> None:
    if count < 1 or seed < 0:
        raise UserError(f"--count {count}, --seed {seed}: the count must be at least 1 and the seed at least 0")
    pipeline = VQVAE2Pipeline.from_pretrained(folder.path, device)
    store = CodeStore.open(folder.code_store("val"))
    store.header.check_autoencoder(pipeline.autoencoder.digest, store.path)
    count = min(count, len(store))
    record = Diagnosis(
        count=count,
        seed=seed,
        rows=(),
        autoencoder=str(pipeline.autoencoder.digest),
        priors=tuple(str(prior.digest) for prior in pipeline.priors),
        torch=torch.__version__,
    )
    previous = read_diagnosis(out, pipeline.levels)
    if previous and previous.model_copy(update={"rows": ()}) == record:
        return
    batches: dict[str, list[Tensor]] = {}
    for start in range(0, count, pipeline.batch_size):
        batch = store.read(range(start, min(start + pipeline.batch_size, count)))
        codes = tuple(level.to(device) for level in batch.codes)
        labels = batch.label.to(device) if pipeline.class_names else None
        for name, images in diagnostic_rows(pipeline, codes, labels, seed, start).items():
            batches.setdefault(name, []).append(images)
    rows = {name: torch.cat(images) for name, images in batches.items()}
    with files.atomic_write(out) as partial:
        for name, images in rows.items():
            save_grid(partial / f"{name}.png", images, columns=min(_COLUMNS, count))
        save_grid(partial / "diagnosis.png", *interleave_rows(*rows.values(), columns=_COLUMNS))
        record = record.model_copy(update={"rows": tuple(rows)})
        files.write_json(diagnosis_path(partial), record.to_dict())


def main(options: DiagnoseOptions) -> None:
    """Run the command `vqvae2 diagnose`."""
    out = diagnose_run(options.run, options.count, options.seed)
    if processes().is_main_process:
        status = read_run(RunFolder(options.run))
        assert status.diagnosis is not None, "just written"
        print(f"{out / 'diagnosis.png'}\nrows: {', '.join(status.diagnosis.rows)}")
        for warning in status.warnings:
            print(f"warning: {warning}")
