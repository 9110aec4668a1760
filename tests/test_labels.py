"""Class labels of sampled images, given as numbers or names."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sampling.labels import as_labels, class_numbers, labels_of
from sampling.params import SamplingConfig
from tests.test_commands import fails
from vqvae2.__main__ import main
from vqvae2.errors import UserError

NAMES = ("tench", "Goldfish", "tabby cat", "crane", "crane")


def test_classes_are_numbers_or_names_in_any_case() -> None:
    assert class_numbers([2, "goldfish", "tabby cat", "Tench"], NAMES) == (2, 1, 2, 0)
    assert class_numbers(["A", "a"], ["a", "A"]) == (1, 0), "an exact match comes first"
    assert class_numbers([], NAMES) == ()
    assert SamplingConfig.from_dict({"classes": "1, tabby cat,0"}, "").classes == ("1", "tabby cat", "0")
    assert class_numbers(("1", "tabby cat", "0"), NAMES) == (1, 2, 0)
    assert class_numbers(["10", "1", 1, "0"], ["1", "10", "2"]) == (1, 0, 1, 0), "a name comes before a number"
    labels = labels_of(range(3), ["tench", 1], NAMES, torch.device("cpu"))
    assert labels is not None
    assert labels.tolist() == [0, 1, 0]
    assert [as_labels(each) for each in ("city", 3, torch.tensor([1, 2]), np.array([1]), None)] == [
        ("city",),
        (3,),
        (1, 2),
        (1,),
        (),
    ]
    with pytest.raises(UserError, match=r"expected names or numbers of classes, not 1\.5"):
        as_labels(1.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("goldfsh", r"no class 'goldfsh'. Did you mean 'Goldfish'\?"),
        ("xyzzy", r"no class 'xyzzy'. The classes are 'tench', .* \(0 to 4\)"),
        ("crane", "the name of the classes 3, 4. Give the number"),
        (5, "no class 5"),
        (-1, "no class -1"),
        ("5", "no class 5"),
    ],
)
def test_unknown_and_ambiguous_classes_raise(label: int | str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_numbers([label], NAMES)


def test_unconditional_models_take_no_classes() -> None:
    with pytest.raises(UserError, match="no class labels"):
        class_numbers(["tench"], ())
    assert labels_of(range(3), None, (), torch.device("cpu")) is None


def test_names_on_the_command_line_mean_their_numbers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "samples")
    assert main(["sample", str(run), "--count", "2", "--classes", "island,3"]) == 0
    assert main(["sample", str(run), "--count", "2", "--classes", "ISLAND,3"]) == 0, "the same images"
    assert [path.name for path in run.glob("samples*")] == ["samples"]
    fails(capsys, ["sample", str(run), "--classes", "iland"], "iland", "island")
