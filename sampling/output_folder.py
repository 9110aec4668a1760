"""Folders of made images: each has a manifest that says how they were made, and is not overwritten by others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vqvae2 import files
from vqvae2.errors import UserError
from vqvae2.pictures import read_png, save_grid, save_rows

_GRID_IMAGES = 64
_ROWS, _ROW_IMAGES = 64, 8  # classes that are shown, and images of each


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the images in a folder were made from; None where it has no manifest."""
    path = folder / "manifest.json"
    return files.read_json(path) if path.is_file() else None


def free_folder(first: Path, manifest: dict[str, Any]) -> Path:
    """The first of NAME, NAME-2, … that is new or holds images made with these very settings."""
    folder, number = first, 1
    while read_manifest(folder) not in (None, manifest):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """UserError where a folder that a person has chosen holds images made otherwise."""
    if read_manifest(folder) not in (None, manifest):
        raise UserError(f"{folder}: holds images made with other settings; choose another folder with --out")


def check_new(folder: Path) -> None:
    """UserError where there is something in the place of a folder that is to be made at once."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists, and holds something else; choose another folder with --out")


def image_path(folder: Path, number: int) -> Path:
    """Where image `number` of a folder lies."""
    return folder / "images" / f"{number:06d}.png"


def write_grids(folder: Path, count: int, labels: Sequence[int] | None, classes: Sequence[str]) -> None:
    """Write grid.png of the first images in a folder and, where they have labels, classes.png with a row for each
    class, in the order of their first images."""
    shown = min(count, _GRID_IMAGES)
    pictures = [read_png(image_path(folder, number)) for number in range(shown)]
    save_grid(folder / "grid.png", torch.stack(pictures), columns=max(1, round(shown**0.5)))
    if labels is None:
        return
    rows = {}
    for label in list(dict.fromkeys(labels))[:_ROWS]:
        chosen = [number for number, found in enumerate(labels) if found == label][:_ROW_IMAGES]
        name = classes[label] if classes.count(classes[label]) == 1 else f"{classes[label]} ({label})"
        rows[name] = torch.stack([read_png(image_path(folder, number)) for number in chosen])
    save_rows(folder / "classes.png", rows)
