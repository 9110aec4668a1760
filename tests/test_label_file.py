"""Labels from CSV, TSV and Parquet files."""

from pathlib import Path

import numpy as np
import pytest

from tests.test_commands import images as image_files
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError

BREEDS = {f"{number}.png": ("pug", "beagle", "collie")[number % 3] for number in range(12)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 12 images."""
    return image_files(tmp_path / "images", 12)


def write(path: Path, rows: list[tuple[str, ...]], separator: str = ",") -> Path:
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    return path


def rows(prefix: str = "", header: tuple[str, str] = ("file_name", "label")) -> list[tuple[str, ...]]:
    return [header, *((prefix + name, breed) for name, breed in BREEDS.items())]


def open_labeled(folder: Path, labels: object, **settings: object) -> tuple[ImageDataset, ImageDataset]:
    config = {"path": str(folder), "size": 8, "labels": str(labels), "val_fraction": 0.3, **settings}
    return open_datasets(DataConfig.from_dict(config, "test"))


def found_breeds(*parts: ImageDataset) -> dict[str, str]:
    return {name: part.classes[part[index].label] for part in parts for index, name in enumerate(part.names)}


def test_labels_of_a_csv_file(folder: Path, tmp_path: Path) -> None:
    parts = open_labeled(folder, write(tmp_path / "labels.csv", [*rows(), ("not-there.png", "poodle")]))
    assert parts[0].classes == parts[1].classes == ("beagle", "collie", "pug"), "rows of other images are ignored"
    assert found_breeds(*parts) == BREEDS


def test_names_may_be_relative_to_the_table_and_columns_may_have_other_names(folder: Path, tmp_path: Path) -> None:
    table = [("image", "size", "breed"), *((f"images/{name}", "9", breed) for name, breed in BREEDS.items())]
    tsv = write(tmp_path / "labels.tsv", table, "\t")
    assert found_breeds(*open_labeled(folder, f"{tsv}:breed")) == BREEDS


def test_labels_of_a_parquet_file(folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = [10 - int(name[:-4]) % 3 for name in BREEDS]
    table = pyarrow.table({"label": numbers, "file_name": list(BREEDS), "unused": np.zeros(12)})
    parquet.write_table(table, tmp_path / "labels.parquet")
    training, held_out = open_labeled(folder, tmp_path / "labels.parquet")
    assert training.classes == ("8", "9", "10"), "numbers are in numerical order"
    expected = dict(zip(BREEDS, map(str, numbers), strict=True))
    assert found_breeds(training, held_out) == expected


@pytest.mark.parametrize(
    ("table", "setting", "message"),
    [
        (rows()[:-2], "a.csv", r"a.csv has no label for 2 of 12 images, the first is 1[01].png. Add them"),
        (
            rows(header=("file_name", "breed")),
            "a.csv",
            "has file_name, breed. Name the column",
        ),
        ([("label",), ("pug",)], "a.csv", "needs the columns"),
        ([*rows(), ("0.png", "collie")], "a.csv", "0.png has two labels, 'pug' and 'collie'"),
        ([*rows(), ("0.png", "")], "a.csv", "no name or no label: '0.png'"),
        ([*rows(), ('"0.png', "pug")], "a.csv", "not a readable .csv file"),
        (rows(), "b.csv", "b.csv: no such file"),
        (rows(), "a.csv:breed", "needs the columns file_name and breed"),
    ],
)
def test_invalid_tables_raise(
    folder: Path, tmp_path: Path, table: list[tuple[str, ...]], setting: str, message: str
) -> None:
    write(tmp_path / "a.csv", table)
    with pytest.raises(UserError, match=message) as error:
        open_labeled(folder, tmp_path / setting)
    assert "\n" not in str(error.value)


def test_damaged_parquet_files_and_unknown_settings_raise(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_labeled(folder, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data.labels|labels: must be none, folder, or a .csv"):
        open_labeled(folder, "folders")


def test_settings_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DataConfig(path="a", val_path="b", labels="c.csv").with_absolute_paths()
    assert (config.path, config.val_path, config.labels) == (
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        f"{tmp_path / 'c.csv'}:label",
    )
    named = DataConfig(path="huggingface:mnist").with_absolute_paths()
    assert (named.path, named.val_path, named.labels) == ("huggingface:mnist", None, "none")
