"""The training and the validation images of a data set: two sources, or one that is split by a hash of the names."""

import logging
from pathlib import Path

import numpy as np

from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.label_file import LabelFile
from vqvae2.data.sources import FolderSource, open_source
from vqvae2.data.sources.base import Source
from vqvae2.data.sources.prepared import PreparedHeader, PreparedSource, read_header
from vqvae2.distributed import get_rank
from vqvae2.errors import UserError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_MAX_LISTED = 20  # classes listed in an error message
_log = logging.getLogger(__name__)


def open_datasets(config: DataConfig, cache: Path | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Open the training and the validation images of a data set.

    `cache` is an optional file for the index of a large source. It is reused until the source changes.

    Raises:
        UserError: If a source cannot be read, has too few images, or lacks the requested labels.
    """
    source = _open_labeled(config, cache)
    if config.val_path is None:
        if len(source.index) < 2:
            raise UserError(
                f"data.path: only one image in {config.path}. Training and validation need at least one each."
            )
        training, held_out = source.index.split(config.val_fraction, config.split_by == "folder")
        if not len(training):
            raise UserError(f"data.split_by: all images of {config.path} are in one folder. Use `image`.")
        return ImageDataset(config, source, training), ImageDataset(config, source, held_out)
    val_source = _open_val_source(config, source, cache.with_stem(f"{cache.stem}-val") if cache else None)
    return _all_images(config, source), _all_images(config, val_source)


def _all_images(config: DataConfig, source: Source) -> ImageDataset:
    return ImageDataset(config, source, np.arange(len(source.index)))


def _open_labeled(config: DataConfig, cache: Path | None) -> Source:
    """Open the source at `config.path`, with labels."""
    source = open_source(config.source, cache)
    if isinstance(source, PreparedSource):
        _check_prepared(config, read_header(Path(source.path)))
    check_class_folders(config, source)
    if file := LabelFile.parse(config.labels):
        source.index = file.label_index(source)
    elif config.labels == "folder" and (unlabeled := np.flatnonzero(source.index.labels < 0)).size:
        name = source.describe(int(unlabeled[0]))
        raise UserError(f"data.labels: {name} is not in a class folder. Move it into one, or use `none`.")
    return source


def _check_prepared(config: DataConfig, prepared: PreparedHeader) -> None:
    """Check that prepared images need not be enlarged, and have the channels that are asked for.

    Raises:
        UserError: If not.
    """
    (height, width), (prepared_height, prepared_width) = config.shape, prepared.size
    if height > prepared_height or width > prepared_width:
        raise UserError(
            f"data.size: {config.path} was prepared for {prepared_height} × {prepared_width} pixels, less than "
            f"{height} × {width}. Lower data.size, or run `vqvae2 prepare --size {height} {width}`."
        )
    if config.channels > prepared.channels:
        raise UserError(
            f"data.channels: {config.path} was prepared with {prepared.channels}, not {config.channels}. Change "
            f"data.channels, or run `vqvae2 prepare --channels {config.channels}`."
        )


def _open_val_source(config: DataConfig, training: Source, cache: Path | None) -> Source:
    """Open the source at `config.val_path`, with the classes of the training images.

    Raises:
        UserError: If it shares images with the training images, or has a class that they do not have.
    """
    val_config = config.model_copy(update={"path": config.val_path})
    try:
        source = _open_labeled(val_config, cache)
    except UserError as error:
        raise UserError(str(error).replace("data.path", "data.val_path", 1)) from None
    locations = {training.location(number) for number in range(len(training.index))}
    shared = [number for number in range(len(source.index)) if source.location(number) in locations]
    if shared:
        raise UserError(
            f"data.val_path: {len(shared):,} images of {config.val_path} are also training images, for example "
            f"{source.describe(shared[0])}. Remove them from one of the two."
        )
    index, classes = source.index, training.index.classes
    names = [index.classes[label] if label >= 0 else None for label in index.labels]
    unknown = sorted(set(index.classes).difference(classes)) if config.labels != "none" else []
    if unknown:
        raise UserError(
            f"data.val_path: {config.val_path} has the classes {', '.join(unknown[:_MAX_LISTED])}, but the training "
            "images do not. Remove them, or use `data.labels: none`."
        )
    source.index = index.with_labels(names, classes)
    return source


def check_class_folders(config: DataConfig, source: Source) -> None:
    """Check that the class folders of a data set are not its splits, as in the root folder of ImageNet.

    Raises:
        UserError: If they are, and `data.labels` asks for classes. Otherwise a warning is logged.
    """
    classes = source.index.classes
    if not classes or not all(name.lower() in _SPLITS for name in classes):
        return
    folders = source.index.names[0].split("/")[:-1]
    one_split = "/".join(folders[: folders.index(classes[0]) + 1]) if classes[0] in folders else classes[0]
    place = f"{config.path}/{one_split}" if isinstance(source, FolderSource) else f"the folder {one_split}, unpacked"
    problem = (
        f"{config.path} contains the splits {', '.join(classes)} instead of classes. Give one split as data.path: "
        f"{place}. A part of it, data.val_fraction, is held out for validation."
    )
    if config.labels == "folder":
        raise UserError(f"data.labels: {problem}")
    if get_rank() == 0:
        _log.warning("vqvae2: warning: data.path: all images of all splits are used: %s", problem)
