"""Class labels of sampled images: given as numbers or names, validated, and repeated in turn."""

import difflib
import operator
import re
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from vqvae2.errors import UserError

Labels = int | str | Sequence[int | str] | Tensor


def as_labels(labels: Labels | None) -> tuple[int | str, ...]:
    """Return labels that are given as one label, several, a tensor or None.

    Raises:
        UserError: If a label is neither a name nor an integer.

    >>> as_labels("dog"), as_labels(torch.tensor([1, 2])), as_labels(None)
    (('dog',), (1, 2), ())
    """
    values = labels.tolist() if isinstance(labels, Tensor) else () if labels is None else labels
    values = (values,) if isinstance(values, int | str | float) else values
    try:
        return tuple(value if isinstance(value, str) else operator.index(value) for value in values)
    except TypeError:
        raise UserError(f"classes: expected names or numbers of classes, not {labels!r}") from None


def require_labels(labels: Labels | None, class_names: Sequence[str]) -> None:
    """Raise UserError if the model is class-conditional and no labels are given."""
    if class_names and not as_labels(labels):
        raise UserError(
            f"classes: this model is class-conditional. Give the classes of the images with --classes: names, or "
            f"numbers from 0 to {len(class_names) - 1}."
        )


def class_numbers(labels: Sequence[int | str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of classes that are given by number or by name, in any case.

    A string that is both a name and a number is the name. An integer is always the number.

    Raises:
        UserError: If a class does not exist, several have the name, or the model is unconditional.

    >>> class_numbers([0, "dog"], ["Cat", "Dog"])
    (0, 1)
    >>> class_numbers(["10", "2", 2], ["1", "10", "2"]), class_numbers(["1"], ["Cat", "Dog"])
    ((1, 2, 2), (1,))
    """
    if labels and not class_names:
        raise UserError("classes: this model has no class labels (it was trained with `data.labels: none`)")
    return tuple(_class_number(label, class_names) for label in labels)


def _class_number(label: int | str, class_names: Sequence[str]) -> int:
    if isinstance(label, int):
        if not 0 <= label < len(class_names):
            raise UserError(f"classes: there is no class {label}. The classes are 0 to {len(class_names) - 1}.")
        return label
    exact = [number for number, name in enumerate(class_names) if name == label]
    found = exact or [number for number, name in enumerate(class_names) if name.casefold() == label.casefold()]
    if not found and re.fullmatch("-?[0-9]+", label):
        return _class_number(int(label), class_names)
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise UserError(f"classes: {label!r} is the name of the classes {numbers}. Give the number.")
    if not found:
        close = difflib.get_close_matches(label, class_names, 1, cutoff=0.5)
        some = ", ".join(map(repr, class_names[:5])) + (", …" if len(class_names) > 5 else "")
        hint = f"Did you mean {close[0]!r}?" if close else f"The classes are {some} (0 to {len(class_names) - 1})."
        raise UserError(f"classes: there is no class {label!r}. {hint}")
    return found[0]


def labels_of(
    images: Sequence[int], labels: Labels | None, class_names: Sequence[str], device: torch.device
) -> Int[Tensor, " b"] | None:
    """Return the label of each image number, cycling through `labels`, or through all classes if none are given.

    Returns None for an unconditional model.

    Raises:
        UserError: If a label does not exist.

    >>> labels_of(range(5), [7, 2], [str(name) for name in range(10)], torch.device("cpu"))
    tensor([7, 2, 7, 2, 7])
    """
    cycle = class_numbers(as_labels(labels), class_names) or tuple(range(len(class_names)))
    if not class_names:
        return None
    return torch.tensor([cycle[image % len(cycle)] for image in images], device=device)
