"""The command `vqvae2 inspect`: what a code store or a folder of prepared images holds, in words and a picture."""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae2 import files
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.data.sources.prepared import PreparedHeader, PreparedSource, read_header
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.pictures import save_grid
from vqvae2.run_folder import level_names

_LISTED = 20  # classes and unreadable images that are named
_SHOWN = 64  # prepared images in the picture


def inspect_codes(path: Path, out: Path) -> list[str]:
    """Lines on a code store; its histograms are drawn to `out`."""
    store = CodeStore.open(path)
    header = store.header
    usages = [CodebookUsage(level.codebook_size) for level in header.levels]
    labels = np.zeros(len(header.classes), np.int64)
    for numbers in SequentialBatchSampler(len(store), 256):
        batch = store.read(numbers)
        for usage, codes in zip(usages, batch.codes, strict=True):
            usage.update(codes)
        labels += np.bincount(batch.label.numpy()[batch.label.numpy() >= 0], minlength=len(labels))[: len(labels)]
    names = level_names(len(usages))
    lines = [
        f"code store    {path}, format {header.format}, complete",
        f"records       {len(store):,} of split {header.split}{', each image and its mirror' if header.flip else ''}",
        f"made from     {header.source}, names {header.data[:12] or 'unknown'}…",
        f"autoencoder   {header.autoencoder[:12]}…",
        *_unreadable([f"record {record:,}" for record in header.unreadable]),
    ]
    for name, level, usage in zip(names, header.levels, usages, strict=True):
        lines.append(
            f"{name:<13} {level.height}×{level.width} codes of {level.codebook_size}: {usage.usage:.1%} in use, entropy "
            f"{usage.entropy:.3f} nats ({usage.entropy / math.log(2):.3f} bits), perplexity {usage.perplexity:.1f}"
        )
    lines += _classes(header.classes, labels)
    if len(store):
        lines.append(f"first, last   {store.image_name(0)}, {store.image_name(len(store) - 1)}")
    _draw(out, {name: usage.counts.numpy() for name, usage in zip(names, usages, strict=True)}, labels)
    return lines


def inspect_images(path: Path, out: Path) -> list[str]:
    """Lines on a folder of prepared images; the first of them are drawn to `out`."""
    header: PreparedHeader = read_header(path)
    source = PreparedSource(str(path), PreparedSource.scan(str(path)))
    height, width = header.size
    quality = f", quality {header.quality}" if header.quality is not None else ""
    lines = [
        f"images        {path}, format {header.format}, complete",
        f"records       {len(source.index):,}, each just covering {height}×{width}, {header.encoding}{quality}",
        f"made from     {header.source}, names {header.data[:12]}…",
        *_unreadable(list(header.unreadable)),
        *_classes(header.classes, np.bincount(source.index.labels.clip(0), minlength=len(header.classes))),
    ]
    config = DataConfig(path=str(path), size=header.size, channels=header.channels)
    shown = ImageDataset(config, source, np.arange(min(_SHOWN, len(source.index))))
    pictures = torch.stack([shown[index].image for index in range(len(shown))])
    save_grid(out, pictures, columns=8)
    return lines


def _unreadable(names: list[str]) -> list[str]:
    if not names:
        return ["unreadable    none"]
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return [f"unreadable    {len(names):,}, left out: {', '.join(names[:_LISTED])}{more}"]


def _classes(classes: tuple[str, ...], counts: NDArray[np.int64]) -> list[str]:
    if not classes:
        return ["classes       none"]
    listed = ", ".join(f"{name} {count:,}" for name, count in zip(classes[:_LISTED], counts.tolist(), strict=False))
    more = f" and {len(classes) - _LISTED:,} more" if len(classes) > _LISTED else ""
    return [f"classes       {len(classes):,}: {listed}{more}"]


def _draw(path: Path, levels: dict[str, NDArray[np.int64]], labels: NDArray[np.int64]) -> None:
    """One panel for each level: how often each code occurs, the commonest first, against even use; one for classes."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure  # slow to import

    panels = {f"{name}: {len(counts)} codes": counts for name, counts in levels.items()}
    if len(labels):
        panels[f"{len(labels)} classes"] = labels
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, counts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        shares = np.sort(counts)[::-1] / max(1, counts.sum())
        axes.stairs(shares, np.arange(len(shares) + 1), fill=True)
        axes.axhline(1 / len(shares), color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="rank", ylabel="share", xlim=(0, len(shares)))
    with files.atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main(arguments: list[str]) -> None:
    """The command `vqvae2 inspect`."""
    parser = argparse.ArgumentParser(prog="vqvae2 inspect", description=__doc__)
    parser.add_argument("store", type=Path, help="a code store (RUN/codes/train) or a folder of prepared images")
    parser.add_argument("--out", type=Path, help="PNG to write; STORE.png, beside the store, by default")
    options = parser.parse_args(arguments)
    store: Path = options.store
    out = options.out or store.with_name(f"{store.resolve().name}.png")
    if not (store / "data.mdb").is_file():
        raise UserError(f"{store}: neither a code store nor prepared images; give a folder that holds a data.mdb")
    lines = inspect_images(store, out) if (store / "index.safetensors").is_file() else inspect_codes(store, out)
    print("\n".join([*lines, str(out)]))
