"""Stage 2: encode every image once and keep its codes in LMDB."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from train.experiment import Run, open_run, say
from train.loop import make_accelerator, to_device
from vqvae2 import files
from vqvae2.data.batches import load
from vqvae2.data.codes import PER_VALUE, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.images import Images, open_images, to_float
from vqvae2.models import Autoencoder


def extract_codes(run: Run) -> None:
    """Write the code stores of both splits; what an earlier run has written is kept."""
    digest = files.digest(run.folder.autoencoder_weights) if run.folder.autoencoder_weights.is_file() else None
    stores = {split: run.folder.code_store(split) for split in ("train", "val")}
    if all(_finished(path, digest) for path in stores.values()):
        say(f"codes: finished, {run.folder.codes}")
        return
    accelerator = make_accelerator()
    network = Autoencoder.load(run.folder.autoencoder_weights, accelerator.device)
    started = time.monotonic()
    for split, images in zip(stores, open_images(run.experiment.data), strict=True):
        _extract(run, network, images, split, accelerator)
    if accelerator.is_main_process:
        files.write_json(run.folder.codes / "summary.json", {"seconds": round(time.monotonic() - started, 1)})


def _finished(path: Path, digest: str | None) -> bool:
    """Whether a complete store of this autoencoder is there; UserError where it is of another one."""
    if not (path / "data.mdb").is_file():
        return False
    header = CodeStore.read_header(path)
    header.check_autoencoder(digest, path)
    return header.complete


def _extract(run: Run, network: Autoencoder, images: Images, split: str, accelerator: Accelerator) -> None:
    path = run.folder.code_store(split)
    if _finished(path, network.digest):
        return
    header = CodeHeader(
        levels=network.maps,
        count=len(images),
        classes=images.classes,
        split=split,
        source=run.experiment.data.path,
        autoencoder=str(network.digest),
    )
    if accelerator.is_main_process:
        CodeWriter(path, header).close()
    accelerator.wait_for_everyone()
    writer = CodeWriter(path, header)
    mine = writer.missing()[accelerator.process_index :: accelerator.num_processes]
    values = [range(number * PER_VALUE, min((number + 1) * PER_VALUE, len(images))) for number in mine]
    batches = load(images, [list(value) for value in values], run.experiment.data.workers)
    bar = tqdm(
        desc=f"codes of {split}", total=sum(map(len, values)), unit="image", disable=not accelerator.is_main_process
    )
    for number, batch in zip(mine, batches, strict=True):
        with torch.inference_mode():
            parts = [
                network.encode(to_float(to_device(part, accelerator.device)))
                for part in batch.image.split(run.experiment.codes.batch_size)
            ]
        writer.write(number, [torch.cat(level) for level in zip(*parts, strict=True)], batch.label)
        bar.update(len(batch.label))
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish()
    else:
        writer.close()
    accelerator.wait_for_everyone()


def main(arguments: list[str]) -> None:
    """The command `vqvae2 extract-codes`."""
    run, _ = open_run("extract-codes", arguments, "Encode every image and cache its codes (stage 2).")
    extract_codes(run)
