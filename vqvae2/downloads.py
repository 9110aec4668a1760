"""Downloads of pretrained weights into torch's cache, with a timeout and one-line errors."""

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from vqvae2.errors import UserError

_TIMEOUT_S = 10
DOWNLOAD_ERRORS = (OSError, RuntimeError, EOFError, http.client.HTTPException, UnpicklingError)


class TorchvisionWeights(NamedTuple):
    """Pretrained weights of a torchvision model."""

    state_dict: dict[str, Tensor]
    path: Path  # of the file in torch's cache
    entry: Any  # member of the model's torchvision weights enum, with `meta` and `transforms()`


def torchvision_weights(model: str, version: str = "DEFAULT", *, label: str, alternative: str) -> TorchvisionWeights:
    """Return pretrained weights of a torchvision model, from torch's cache or downloaded into it.

    `version` is a member of the model's weights enum, such as `IMAGENET1K_V1`. Only tensors are unpickled. Errors start
    with `label`, the setting that asked for the weights, and offer `alternative`.

    Raises:
        UserError: If the weights are neither cached nor downloadable, or are corrupted.
    """
    enum: Any = torchvision.models.get_model_weights(model)
    entry = enum[version] if version != "DEFAULT" else enum.DEFAULT
    path = cache_path(Path(entry.url).name)
    with connection_timeout():
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except DOWNLOAD_ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{label}: cannot download the weights of {model} ({reason}). "
                f"Put {entry.url} at {path}, or {alternative}."
            ) from None
    return TorchvisionWeights(state, path, entry)


def cache_path(name: str) -> Path:
    """Return the path of a file in torch's cache of checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


@contextmanager
def connection_timeout(seconds: float = _TIMEOUT_S) -> Iterator[None]:
    """Bound the wait for a connection: `torch.hub` has no timeout argument of its own."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
