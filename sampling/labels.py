"""Class labels of sampled images: validated, and repeated in turn."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from vqvae2.errors import UserError


def require_labels(labels: Sequence[int] | None, class_names: Sequence[str]) -> None:
    """Raise UserError if the model is class-conditional and no labels are given."""
    if class_names and not labels:
        raise UserError(
            f"classes: this model is class-conditional. Give the labels of the images, 0 to {len(class_names) - 1}, "
            "with --classes."
        )


def labels_of(
    images: Sequence[int], labels: Sequence[int] | None, class_names: Sequence[str], device: torch.device
) -> Int[Tensor, " b"] | None:
    """Return the label of each image number, cycling through `labels`, or through all classes if none are given.

    Returns None for an unconditional model.

    Raises:
        UserError: If a label does not exist.

    >>> labels_of(range(5), [7, 2], [str(name) for name in range(10)], torch.device("cpu"))
    tensor([7, 2, 7, 2, 7])
    """
    if not class_names:
        if labels:
            raise UserError("classes: this model has no class labels (it was trained with `data.labels: none`)")
        return None
    cycle = list(labels or range(len(class_names)))
    for label in cycle:
        if not 0 <= label < len(class_names):
            raise UserError(f"classes: there is no class {label}. The classes are 0 to {len(class_names) - 1}.")
    return torch.tensor([cycle[image % len(cycle)] for image in images], device=device)
