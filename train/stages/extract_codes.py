"""Stage 2: encode every image once and keep its codes in LMDB."""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sampling.run_data import load_run_autoencoder, open_run_datasets
from train.accelerator import make_accelerator, to_device
from train.run import Run, RunOptions, open_run, print_main
from vqvae2 import files
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import RECORDS_PER_VALUE, UNREADABLE_LABEL, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.images import ImageDataset, to_float
from vqvae2.data.samplers import load_batches
from vqvae2.models import Autoencoder


class ExtractCodesOptions(RunOptions):
    """Encode every image and cache its codes in LMDB (stage 2), or resume."""


def extract_codes(run: Run) -> None:
    """Write the code stores of both splits, or resume writing them. Do nothing if they are complete."""
    digest = files.digest(run.folder.autoencoder_weights) if run.folder.autoencoder_weights.is_file() else None
    stores = {split: run.folder.code_store(split) for split in ("train", "val")}
    if all(_finished(path, digest) for path in stores.values()):
        print_main(f"codes: already complete, {run.folder.codes}")
        return
    accelerator = make_accelerator()
    network = load_run_autoencoder(run.config, run.folder, accelerator.device)
    started = time.monotonic()
    for split, images in zip(stores, open_run_datasets(run.config.data, run.folder), strict=True):
        _extract(run, network, images, split, accelerator, started)


def _finished(path: Path, digest: str | None) -> bool:
    """Return whether there is a complete store of this autoencoder.

    Raises:
        UserError: If the store holds codes of another autoencoder.
    """
    if not lmdb_environment.exists(path):
        return False
    header = CodeStore.read_header(path)
    header.check_autoencoder(digest, path)
    return header.complete and lmdb_environment.is_sealed(path)


class Record(NamedTuple):
    """An image or its mirror image, to be encoded. The label of an unreadable image is `UNREADABLE_LABEL`."""

    image: UInt8[Tensor, "c h w"]
    label: int


class Records(Dataset[Record]):
    """The images of a split, in the order of the records of its store; with `flip`, each is followed by its mirror."""

    def __init__(self, images: ImageDataset, flip: bool) -> None:
        self.images, self.flip = images, flip

    def __len__(self) -> int:
        return len(self.images) * (2 if self.flip else 1)

    def __getitems__(self, numbers: Sequence[int]) -> list[Record]:
        """Return records in order; both records of an image share one decoding."""
        at, item, records = -1, None, []
        for number in numbers:
            index, mirrored = divmod(number, 2) if self.flip else (number, 0)
            if index != at:
                at, item = index, self.images.read(index)
            if item is None:
                config = self.images.config
                records.append(Record(torch.zeros(config.channels, *config.shape, dtype=torch.uint8), UNREADABLE_LABEL))
            else:
                records.append(Record(item.image.flip(2) if mirrored else item.image, item.label))
        return records

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Return the image name of each record."""
        names = self.images.names
        return [names[number // 2 if self.flip else number] for number in numbers]


def _extract(
    run: Run, network: Autoencoder, images: ImageDataset, split: str, accelerator: Accelerator, started: float
) -> None:
    path = run.folder.code_store(split)
    if _finished(path, network.digest):
        return
    records = Records(images, flip=split == "train" and run.config.extract_codes.flip)
    header = CodeHeader(
        levels=network.map_specs,
        count=len(records),
        classes=images.classes,
        split=split,
        source=run.config.data.path,
        data=images.digest(),
        flip=records.flip,
        autoencoder=str(network.digest),
    )
    if accelerator.is_main_process:
        CodeWriter(path, header).close()
    accelerator.wait_for_everyone()
    with closing(CodeWriter(path, header)) as writer:
        # LMDB's locks do not work across a network file system, so only processes of the first machine write.
        writers = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
        mine = (
            writer.missing_values()[accelerator.process_index :: writers] if accelerator.process_index < writers else []
        )
        accelerator.wait_for_everyone()  # what a faster process writes must not be left out of a slower one's list
        _write(run, network, records, writer, mine, accelerator)
        accelerator.wait_for_everyone()
        unreadable = writer.unreadable_records()
        images.check_unreadable_fraction([record // 2 for record in unreadable[::2]] if records.flip else unreadable)
        if accelerator.is_main_process:
            # Written first: after the last store is complete, an interrupted command would not write it anymore.
            files.write_json(run.folder.codes_summary, {"seconds": round(time.monotonic() - started, 1)})
            writer.finish()
            if unreadable:
                print_main(
                    f"codes of {split}: {len(unreadable):,} of {header.count:,} records skipped: unreadable images"
                )
    accelerator.wait_for_everyone()


def _write(
    run: Run, network: Autoencoder, records: Records, writer: CodeWriter, mine: list[int], accelerator: Accelerator
) -> None:
    """Encode this process's share of the values of the store."""
    values = [
        list(range(number * RECORDS_PER_VALUE, min((number + 1) * RECORDS_PER_VALUE, len(records)))) for number in mine
    ]
    batches = load_batches(records, values, run.config.data.num_workers)
    split, main = writer.header.split, accelerator.is_main_process
    with tqdm(desc=f"codes of {split}", total=sum(map(len, values)), unit="image", disable=not main) as bar:
        for number, value, batch in zip(mine, values, batches, strict=True):
            with torch.inference_mode():
                parts = [
                    network.encode(to_float(to_device(part, accelerator.device)))
                    for part in batch.image.split(run.config.extract_codes.batch_size)
                ]
            codes = [torch.cat(level) for level in zip(*parts, strict=True)]
            writer.write(number, codes, batch.label, records.names(value))
            bar.update(len(value))


def main(options: ExtractCodesOptions) -> None:
    """Run the command `vqvae2 extract-codes`."""
    extract_codes(open_run(options))
