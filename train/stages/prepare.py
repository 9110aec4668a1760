"""The command `vqvae2 prepare`: resize a dataset once and store it in LMDB, which later runs read faster."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from tyro.conf import Positional

from vqvae2 import files
from vqvae2.code_maps import PositiveInt
from vqvae2.command_line import Options
from vqvae2.data.image_io import MAX_PIXELS, UnreadableImageError
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.data.sources import open_source
from vqvae2.data.sources.prepared import PreparedHeader, PreparedWriter, encode_image
from vqvae2.data.splits import check_class_folders
from vqvae2.errors import UserError

_PER_TRANSACTION = 64  # images; a killed process loses only the batches in progress


class PrepareOptions(Options):
    """Resize a data set once and store it in LMDB, which later runs read faster."""

    source: Positional[str] = Field(description="anything that data.path accepts")
    out: Positional[Path] = Field(description="folder to write, for data.path")
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        description="side of a square, or height and width, in pixels"
    )
    channels: Literal[1, 3, 4] = Field(default=3, description="1 gray, 3 RGB, 4 RGBA")
    format: Literal["jpeg", "webp", "png", "raw"] = Field(default="jpeg", description="png and raw are lossless")
    quality: int = Field(default=95, ge=1, le=100, description="quality of jpeg and webp")
    num_workers: int = Field(default=2, ge=0, le=1024, description="processes that decode and encode")
    max_unreadable_fraction: float = Field(
        default=0.01, ge=0, lt=1, description="fraction of the whole data set that may be unreadable and is skipped"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2**31,
        description="images with more pixels are unreadable, because of their memory",
    )


class Encoded(Dataset[tuple[Tensor, list[int]]]):
    """Encoded images. A batch is one uint8 tensor of concatenated records, and their lengths; 0 if unreadable.

    Workers return tensors through shared memory. Bytes would go through a pipe, which would block the workers
    of a killed command forever.
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
            file, name = source.open(number, self.header.size), source.describe(number)
            return encode_image(file, self.header, name, self.images.config.max_pixels)
        except UnreadableImageError as error:
            self.images.mark_unreadable(number, error)
            return b""


def prepare(config: DataConfig, out: Path, encoding: str, quality: int | None) -> PreparedHeader:
    """Resize the images of `config` to cover the size and write them to the folder `out`, or resume writing."""
    if encoding == "jpeg" and config.channels == 4:
        raise UserError("--format: jpeg has no transparency; choose webp, png or raw for --channels 4")
    source = open_source(config.source)
    check_class_folders(config, source)
    images = ImageDataset(config, source, np.arange(len(source.index)))
    header = PreparedHeader.from_dict(
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
    files.lock_folder(out)
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


def main(options: PrepareOptions) -> None:
    """Run the command `vqvae2 prepare`."""
    config = DataConfig.from_dict(
        {
            "path": options.source,
            "size": options.size,
            "channels": options.channels,
            "num_workers": options.num_workers,
            "max_unreadable_fraction": options.max_unreadable_fraction,
            "max_pixels": options.max_pixels,
        },
        "vqvae2 prepare",
    )
    header = prepare(config, options.out, options.format, options.quality)
    skipped = f", {len(header.unreadable):,} unreadable images skipped" if header.unreadable else ""
    print(f"{options.out}: {header.count - len(header.unreadable):,} images{skipped}. Use it as data.path.")
