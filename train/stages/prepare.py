"""The command `vqvae2 prepare`: resize a data set once and keep it in LMDB, which every later run reads faster."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.data.sources import open_source
from vqvae2.data.sources.prepared import PreparedHeader, PreparedWriter, encode_image
from vqvae2.errors import UserError

_PER_TRANSACTION = 64  # images; what a kill loses is the batches that workers have at hand


class Encoded(Dataset[tuple[Tensor, list[int]]]):
    """The images of a data set as records, a batch's in one tensor with their lengths; an unreadable one is empty.

    Tensors leave a worker through shared memory. Bytes would leave through a pipe, on which the worker of a killed
    command would wait for ever.
    """

    def __init__(self, images: ImageDataset, header: PreparedHeader) -> None:
        self.images, self.header = images, header

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        records = [self._encode(number) for number in numbers]
        joined = np.frombuffer(b"".join(records), np.uint8).copy()
        return torch.from_numpy(joined), [len(record) for record in records]

    def _encode(self, number: int) -> bytes:
        source = self.images.source
        try:
            return encode_image(source.open(number, self.header.size), self.header, source.describe(number))
        except UnreadableImageError as error:
            self.images.mark_unreadable(number, error)
            return b""


def prepare(config: DataConfig, out: Path, encoding: str, quality: int | None) -> PreparedHeader:
    """Write the images of `config` to the folder `out`, each just covering the size, or go on where it was stopped."""
    if encoding == "jpeg" and config.channels == 4:
        raise UserError("--format: jpeg has no transparency; choose webp, png or raw for --channels 4")
    source = open_source(config.source)
    images = ImageDataset(config, source, np.arange(len(source.index)))
    header = PreparedHeader.parse(
        {
            "source": config.path,
            "data": images.digest(),
            "size": config.shape,
            "channels": config.channels,
            "encoding": encoding,
            "quality": quality if encoding in ("jpeg", "webp") else None,
            "count": len(images),
            "classes": source.index.classes,
        },
        "vqvae2 prepare",
    )
    order = SequentialBatchSampler(len(images), _PER_TRANSACTION)
    with closing(PreparedWriter(out, header)) as writer:
        if writer.finished:
            return writer.header
        done = writer.num_written()
        order.batches = order.batches[done // _PER_TRANSACTION :]
        _write(Encoded(images, header), order, writer, tqdm(initial=done, total=len(images), unit="image"))
        images.check_unreadable_fraction(writer.unreadable_records())
        return writer.finish(source.index)


def _write(encoded: Encoded, order: SequentialBatchSampler, writer: PreparedWriter, bar: tqdm) -> None:
    batches: Any = load_batches(encoded, order, encoded.images.config.num_workers)
    with bar:
        for numbers, (joined, lengths) in zip(order, batches, strict=True):
            data, ends = joined.numpy().tobytes(), np.cumsum(lengths).tolist()
            writer.write(numbers[0], [data[end - length : end] for end, length in zip(ends, lengths, strict=True)])
            bar.update(len(numbers))


def main(arguments: list[str]) -> None:
    """The command `vqvae2 prepare`."""
    parser = argparse.ArgumentParser(prog="vqvae2 prepare", description=__doc__)
    parser.add_argument("source", help="anything that data.path takes")
    parser.add_argument("out", type=Path, help="the folder to write, which data.path takes then")
    parser.add_argument("--size", type=int, nargs="+", required=True, metavar="N", help="side, or height and width")
    parser.add_argument("--channels", type=int, default=3, choices=[1, 3, 4])
    parser.add_argument("--format", default="jpeg", choices=["jpeg", "webp", "png", "raw"], help="png, raw: lossless")
    parser.add_argument("--quality", type=int, default=95, help="of jpeg and webp, 1 to 100")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that decode and encode")
    parser.add_argument(
        "--max-unreadable-fraction", type=float, default=0.01, help="share of images that may be unreadable"
    )
    options = parser.parse_args(arguments)
    settings = {
        "path": options.source,
        "size": options.size[0] if len(options.size) == 1 else options.size,
        "channels": options.channels,
        "num_workers": options.num_workers,
        "max_unreadable_fraction": options.max_unreadable_fraction,
    }
    header = prepare(DataConfig.parse(settings, "vqvae2 prepare"), options.out, options.format, options.quality)
    left_out = f", {len(header.unreadable):,} unreadable left out" if header.unreadable else ""
    print(f"{options.out}: {header.count - len(header.unreadable):,} images{left_out}; use it as data.path")
