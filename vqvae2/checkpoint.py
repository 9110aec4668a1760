"""Weights and their settings in one safetensors file: data, never a program.

The file's metadata holds a JSON object under the key `vqvae2`: what kind of network it is, the config that builds it,
and the digests of what it was made from. Its `sha256` is the digest of all else in it and of every tensor, which `load`
recomputes: a damaged file is never taken for another result. (One key, since safetensors writes several in any order.)
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqvae2 import files
from vqvae2.errors import UserError

_KEY, _DIGEST = "vqvae2", "sha256"


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors (any device) and JSON `metadata` to `path`, atomically."""
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({_DIGEST: _digest(metadata, tensors)} | metadata)
    with files.atomic_write(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={_KEY: text})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `save` wrote; UserError where it is missing, damaged or foreign."""
    digest, metadata = _read(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from None
    if _digest(metadata, tensors) != digest:
        raise _damaged(path, "its contents are not those that were written")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, without reading the tensors, which only `load` checks."""
    return _read(path)[1]


def load_state_dict(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load tensors into a module strictly: each one present, none left over, every shape equal."""
    expected = module.state_dict()
    for name in (*expected, *tensors):
        if name not in tensors:
            raise UserError(f"{source}: the weight `{name}` is missing; the file is of another version or model")
        if name not in expected:
            raise UserError(f"{source}: the weight `{name}` is not one of this model's")
        if expected[name].shape != tensors[name].shape:
            raise UserError(
                f"{source}: the weight `{name}` has shape {tuple(tensors[name].shape)}, "
                f"the model needs {tuple(expected[name].shape)}"
            )
    with torch.no_grad():
        module.load_state_dict(tensors, strict=True)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The digest in a file, and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such weights file; train the stage that makes it first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if _KEY not in metadata:
        raise UserError(f"{path}: a safetensors file of another program (it has no `{_KEY}` metadata), or damaged")
    try:
        content = dict(json.loads(metadata[_KEY]))
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    return content.pop(_DIGEST, ""), content


def _digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the metadata, and of the name, type, shape and bytes of every tensor."""
    sha = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _damaged(path: Path, error: object) -> UserError:
    return UserError(f"{path}: damaged weights file ({error}); delete it and run the stage that makes it again")
