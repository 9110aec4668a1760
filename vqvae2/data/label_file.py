"""Labels in a table: a CSV, TSV or Parquet file with a column of image names and a column of labels."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vqvae2 import files
from vqvae2.data.index import ImageIndex, sorted_classes
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError, printable

SUFFIXES = (".csv", ".tsv", ".parquet")
_NAME_COLUMN, _LABEL_COLUMN = "file_name", "label"


class LabelFile(NamedTuple):
    """A table and its column of labels, from a setting such as `labels.csv`, or `labels.csv:breed`."""

    path: Path
    column: str

    @classmethod
    def parse(cls, setting: str) -> "LabelFile | None":
        """Return the file and the column that a setting names, or None if it names neither."""
        for path, column in ((setting, _LABEL_COLUMN), setting.rpartition(":")[::2]):
            if path.lower().endswith(SUFFIXES) and column:
                return cls(Path(path).expanduser(), column)
        return None

    def absolute(self) -> str:
        """Return the setting with an absolute path."""
        return f"{self.path.absolute()}:{self.column}"

    def label_index(self, source: Source) -> ImageIndex:
        """Return the index of a source with the labels in the file. Rows of other images are ignored.

        The table names an image by its path in the source, or relative to the folder of the table.

        Raises:
            UserError: If the file is missing or damaged, lacks a column, or has no label for an image.
        """
        labels = dict(self._read())
        found = [_find(labels, name, source, self.path) for name in source.index.names]
        missing = [number for number, label in enumerate(found) if label is None]
        if missing:
            raise UserError(
                f"data.labels: {printable(str(self.path))} has no label for {len(missing):,} of {len(found):,} images, "
                f"the first is {printable(source.index.names[missing[0]])}. Add them, or remove the images."
            )
        return source.index.with_labels(found, sorted_classes({label for label in found if label is not None}))

    def _read(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the label of each row."""
        files.require_file(self.path, f"data.labels: {self.path}", "Give a CSV, TSV or Parquet file.")
        rows = _read_parquet(self.path, self.column) if self._suffix == ".parquet" else self._read_text()
        seen: dict[str, str] = {}
        for name, label in rows:
            if not name or not label:
                raise UserError(f"data.labels: {self.path}: a row has no name or no label: {name or label!r}. Fill it.")
            if seen.setdefault(name, label) != label:
                raise UserError(f"data.labels: {self.path}: {name} has two labels, {seen[name]!r} and {label!r}.")
            yield name, label

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    def _read_text(self) -> Iterator[tuple[str, str]]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, delimiter="\t" if self._suffix == ".tsv" else ",", strict=True)
                names = _name_column(rows.fieldnames or (), self.column, self.path)
                for row in rows:
                    yield (row[names] or "").strip(), (row[self.column] or "").strip()
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"data.labels: {self.path}: not a readable {self._suffix} file ({error}).") from None


def _name_column(columns: object, label_column: str, path: Path) -> str:
    """Return `file_name` if it is one of the columns, and the first column otherwise.

    Raises:
        UserError: If the label column is missing, or is the only one.
    """
    names = [str(name) for name in columns] if isinstance(columns, list | tuple) else []
    others = [name for name in names if name != label_column]
    if len(others) == len(names) or not others:
        raise UserError(
            f"data.labels: {path} needs the columns {_NAME_COLUMN} and {label_column}, but has {', '.join(names)}. "
            f"Name the column of the labels: data.labels: {path.name}:COLUMN"
        )
    return _NAME_COLUMN if _NAME_COLUMN in others else others[0]


def _read_parquet(path: Path, label_column: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow.parquet  # an optional dependency  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
    except ImportError:
        raise UserError(
            f"data.labels: {path} needs the package `pyarrow`. Install it: pip install 'vqvae2[huggingface]'"
        ) from None
    try:
        schema = pyarrow.parquet.read_schema(path)
        names = _name_column(schema.names, label_column, path)
        table = pyarrow.parquet.read_table(path, columns=[names, label_column])
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.labels: {path}: not a readable Parquet file ({reason}).") from None
    for name, label in zip(table[names].to_pylist(), table[label_column].to_pylist(), strict=True):
        yield str(name or ""), "" if label is None else str(label)


def _find(labels: dict[str, str], name: str, source: Source, table: Path) -> str | None:
    if name in labels:
        return labels[name]
    relative = os.path.relpath(Path(source.path, name), table.parent).replace(os.sep, "/")
    return labels.get(relative)
