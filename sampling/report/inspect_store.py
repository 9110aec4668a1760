"""The command `vqvae2 inspect`: summarize a code store or a folder of prepared images as text and an image."""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tyro.conf import Positional

from sampling.output_folder import check_new_picture, next_new
from vqvae2.command_line import Options
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.data.sources.prepared import PreparedHeader, PreparedSource, read_header
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.pictures import make_figure, save_figure, save_grid
from vqvae2.run_folder import level_names

_MAX_LISTED = 20  # classes and unreadable images listed by name
_MAX_IMAGES = 64  # prepared images in the grid


def inspect_code_store(path: Path, out: Path) -> list[str]:
    """Summarize a code store, and plot the histograms of its codes and classes to `out`.

    Returns:
        The lines of the summary.
    """
    store = CodeStore.open(path)
    header = store.header
    usages, label_counts = _count(store)
    names = level_names(len(usages))
    mirrored = ", each image and its mirror image" if header.flip else ""
    lines = [
        _line("code store", f"{path}, format {header.format}, complete"),
        _line("records", f"{len(store):,} in split {header.split}{mirrored}"),
        _line("source", f"{header.source}, digest of names and labels {header.data[:12] or 'unknown'}…"),
        _line("autoencoder", f"{header.autoencoder[:12]}…"),
        _unreadable_line([f"record {record:,}" for record in header.unreadable]),
    ]
    for name, level, usage in zip(names, header.levels, usages, strict=True):
        nats = max(0.0, usage.entropy)  # rounding can give −0
        entropy = f"entropy {nats:.3f} nats ({nats / math.log(2):.3f} bits)"
        size = f"{level.height}×{level.width}, codebook size {level.codebook_size}"
        lines.append(_line(name, f"{size}: usage {usage.usage:.1%}, {entropy}, perplexity {usage.perplexity:.1f}"))
    lines.append(_classes_line(header.classes, label_counts))
    if len(store):
        lines.append(_line("first, last", f"{store.image_name(0)}, {store.image_name(len(store) - 1)}"))
    _plot(out, {name: usage.counts.numpy() for name, usage in zip(names, usages, strict=True)}, label_counts)
    return lines


def inspect_prepared_images(path: Path, out: Path) -> list[str]:
    """Summarize a folder of prepared images, and write a grid of the first ones to `out`.

    Returns:
        The lines of the summary.
    """
    header: PreparedHeader = read_header(path)
    source = PreparedSource(str(path), PreparedSource.scan(str(path)))
    height, width = header.size
    quality = f", quality {header.quality}" if header.quality is not None else ""
    label_counts = np.bincount(source.index.labels[source.index.labels >= 0], minlength=len(header.classes))
    lines = [
        _line("images", f"{path}, format {header.format}, complete"),
        _line("records", f"{len(source.index):,}, resized to cover {height}×{width}, {header.encoding}{quality}"),
        _line("source", f"{header.source}, digest of names and labels {header.data[:12]}…"),
        _unreadable_line(list(header.unreadable)),
        _classes_line(header.classes, label_counts),
    ]
    config = DataConfig.from_dict({"path": str(path), "size": header.size, "channels": header.channels}, str(path))
    images = ImageDataset(config, source, np.arange(min(_MAX_IMAGES, len(source.index))))
    save_grid(out, torch.stack([images[index].image for index in range(len(images))]), columns=8)
    return lines


def _count(store: CodeStore) -> tuple[list[CodebookUsage], NDArray[np.int64]]:
    """Return the usage of each level's codes, finest first, and the number of records in each class."""
    usages = [CodebookUsage(level.codebook_size) for level in store.header.levels]
    label_counts = np.zeros(len(store.header.classes), np.int64)
    for indices in SequentialBatchSampler(len(store), 256):
        batch = store.read(indices)
        for usage, codes in zip(usages, batch.codes, strict=True):
            usage.update(codes)
        labels = batch.label.numpy()
        label_counts += np.bincount(labels[labels >= 0], minlength=len(label_counts))[: len(label_counts)]
    return usages, label_counts


def _line(label: str, text: str) -> str:
    return f"{label:<14}{text}"


def _unreadable_line(names: list[str]) -> str:
    if not names:
        return _line("unreadable", "none")
    more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
    return _line("unreadable", f"{len(names):,}, skipped: {', '.join(names[:_MAX_LISTED])}{more}")


def _classes_line(classes: tuple[str, ...], counts: NDArray[np.int64]) -> str:
    if not classes:
        return _line("classes", "none")
    pairs = zip(classes[:_MAX_LISTED], counts.tolist(), strict=False)
    more = f" and {len(classes) - _MAX_LISTED:,} more" if len(classes) > _MAX_LISTED else ""
    return _line("classes", f"{len(classes):,}: {', '.join(f'{name} {count:,}' for name, count in pairs)}{more}")


def _plot(path: Path, levels: dict[str, NDArray[np.int64]], labels: NDArray[np.int64]) -> None:
    """Plot the sorted frequencies of codes and classes, with the uniform frequency as a dashed line."""
    panels = {f"{name}: {len(counts)} codes": counts for name, counts in levels.items()}
    if len(labels):
        panels[f"{len(labels)} classes"] = labels
    figure = make_figure(len(panels))
    for axes, (title, counts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        frequencies = np.sort(counts)[::-1] / max(1, counts.sum())
        axes.stairs(frequencies, np.arange(len(frequencies) + 1), fill=True)
        axes.axhline(1 / len(frequencies), color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="rank", ylabel="relative frequency", xlim=(0, len(frequencies)))
    save_figure(path, figure)


class InspectOptions(Options):
    """Summarize a code store or a folder of prepared images, in text and in a picture."""

    store: Positional[Path] = Field(description="code store (RUN/codes/train) or folder of prepared images")
    out: Path | None = Field(
        default=None,
        description="new PNG to write; STORE.png beside the store if not given, or STORE-2.png, … if it exists",
    )


def main(options: InspectOptions) -> None:
    """Run the command `vqvae2 inspect`."""
    store, resolved = options.store, options.store.resolve()
    if not (store / "data.mdb").is_file():
        found = sorted([*store.glob("*/data.mdb"), *store.glob("codes/*/data.mdb")])
        stores = ", ".join(str(path.parent) for path in found)
        hint = f"Did you mean {stores}?" if stores else "Pass a folder that contains data.mdb."
        raise UserError(f"{store}: neither a code store nor prepared images. {hint}")
    out = options.out or next_new(resolved.with_name(f"{resolved.name}.png"), ".png")
    check_new_picture(out)
    lines = (
        inspect_prepared_images(store, out)
        if (store / "index.safetensors").is_file()
        else inspect_code_store(store, out)
    )
    print("\n".join([*lines, str(out)]))
