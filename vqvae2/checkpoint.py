"""Weights with their config in one safetensors file, and safe reading of weights in other formats.

The file's metadata holds one JSON object under the key `vqvae2`: the kind of network, its config, and the digests of
the artifacts it was made from. The object's `sha256` field is a checksum of the rest of the object and of all tensors.
`load` recomputes it, so a corrupted file is always detected. There is a single metadata key because safetensors does
not write several keys in a fixed order, and the same weights must give the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqvae2 import files
from vqvae2.config import Config
from vqvae2.errors import UserError

_METADATA_KEY, _CHECKSUM_KEY, _FORMAT_KEY = "vqvae2", "sha256", "format"
_FORMAT = 2
_FIX = "Delete it and rerun the stage that writes it."
_READ_ERRORS = (
    SafetensorError,
    UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
)

Module = TypeVar("Module", bound=nn.Module)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write tensors (on any device) and JSON-serializable `metadata` to a safetensors file, atomically.

    Floating-point tensors are converted to `dtype`, if given.
    """
    # Clone, because safetensors rejects tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    if dtype is not None:
        tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
    text = json.dumps({_CHECKSUM_KEY: _checksum(metadata, tensors), _FORMAT_KEY: _FORMAT} | metadata)
    with files.atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            safetensors.torch.save_file(tensors, partial, metadata={_METADATA_KEY: text})
        except SafetensorError as error:  # for example a full disk
            raise OSError(None, str(error), str(path)) from None
        partial.chmod(mode)  # safetensors makes it readable by its owner only


def load(path: Path, network: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file written by `save`.

    `network` is the expected value of the metadata's `network`; an empty string accepts any.

    Raises:
        UserError: If the file is missing, corrupted, was not written by `save`, or holds another kind of network.
    """
    checksum, metadata = _read_header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except _READ_ERRORS as error:
        raise _corrupted(path, error) from None
    if _checksum(metadata, tensors) != checksum:
        raise _corrupted(path, "checksum mismatch")
    _check_network(metadata, network, path)
    return tensors, metadata


def save_module(path: Path, network: str, module: nn.Module, config: Config, made_from: Mapping[str, Any]) -> None:
    """Write a network with its config and the digests of what it was made from. `network` is its kind."""
    save(path, module.state_dict(), {"network": network, "config": config.to_dict(), "made_from": dict(made_from)})


def load_module(path: Path, network: str, build: Callable[[], Module]) -> Module:
    """Return the network in a file written by `save_module`, in evaluation mode. See `load` and `build_module`."""
    tensors, _ = load(path, network)
    return build_module(build, tensors, path).eval()


def read_metadata(path: Path, network: str = "") -> dict[str, Any]:
    """Return the metadata of a file written by `save`, without reading its tensors or verifying the checksum.

    Raises:
        UserError: If the file is missing, corrupted, was not written by `save`, or holds another kind of network.
    """
    metadata = _read_header(path)[1]
    _check_network(metadata, network, path)
    return metadata


def _check_network(metadata: dict[str, Any], network: str, path: Path) -> None:
    if network and metadata.get("network") != network:
        raise UserError(f"{path}: weights of the network type {metadata.get('network')!r}, expected {network!r}.")


def load_state_dict(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load tensors into a module strictly: names, shapes and dtypes must match exactly. `source` is named in errors.

    Raises:
        UserError: If a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    _check_state_dict(module, tensors, source)
    with torch.no_grad():
        module.load_state_dict(tensors, strict=True)


def _check_state_dict(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    expected = module.state_dict()
    for name in (*expected, *tensors):
        if name not in tensors:
            raise UserError(f"{source}: missing weight `{name}`. The file belongs to another model or version.")
        if name not in expected:
            raise UserError(f"{source}: unexpected weight `{name}`. The file belongs to another model or version.")
        wanted, found = expected[name], tensors[name]
        if wanted.shape != found.shape:
            raise UserError(
                f"{source}: weight `{name}` has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}. The file "
                "belongs to another model or version."
            )
        if wanted.dtype != found.dtype:
            raise UserError(f"{source}: weight `{name}` has dtype {found.dtype}, expected {wanted.dtype}.")
        if found.is_floating_point() and not found.isfinite().all():
            raise UserError(f"{source}: weight `{name}` is not finite. Train the network again.")


def build_module(build: Callable[[], Module], tensors: dict[str, Tensor], source: Path) -> Module:
    """Return the float32 module that `build` constructs, on the CPU, with `tensors` as its weights.

    The module is constructed on the meta device, so no time is spent on random initialization.

    Raises:
        UserError: If the tensors do not match the module.
    """
    half = (torch.bfloat16, torch.float16)
    tensors = {name: each.float() if each.dtype in half else each for name, each in tensors.items()}
    with torch.device("meta"):
        module = build()
    _check_state_dict(module, tensors, source)  # before anything is allocated
    # As `to_empty`, except for what is not on the meta device, such as a table that a package computes.
    module = module._apply(lambda each: torch.empty_like(each, device="cpu") if each.is_meta else each)
    load_state_dict(module, tensors, source)
    return module


def read_state_dict(path: Path, label: str = "", hint: str = "", key: str = "") -> dict[str, Tensor]:
    """Return the state dict in a PyTorch (.pt, .pth) or .safetensors file. Only tensors are unpickled.

    Errors start with `label` (the setting that names the file) and end with `hint`. A state dict nested under `key` is
    unwrapped.

    Raises:
        UserError: If the file is missing, unreadable, or holds anything but tensors by name.
    """
    name = f"{label}: {path}" if label else str(path)
    ending = f" {hint}" if hint else ""
    files.require_file(path, name, hint)
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        reason = str(error).strip().split(". ")[0].splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: corrupted, or not a weights-only file ({reason}).{ending}") from None
    if key and isinstance(state, dict) and isinstance(state.get(key), dict):
        state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise UserError(f"{name}: not a state dict (tensors by name).{ending}")
    for key, value in state.items():
        if not (isinstance(value, Tensor) and _is_plain(value)):
            raise UserError(f"{name}: not a state dict (tensors by name): `{key}` is not an ordinary tensor.{ending}")
    return state


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, and not larger than the memory that the file has for it."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_header(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the stored checksum and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such weights file. Train the stage that writes it first.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupted(path, error) from None
    if _METADATA_KEY not in metadata:
        raise UserError(f"{path}: not a weights file of this project (no `{_METADATA_KEY}` metadata), or corrupted.")
    content = files.parse_json(metadata[_METADATA_KEY].encode(), path, _FIX)
    if not isinstance(content, dict):
        raise _corrupted(path, "invalid metadata")
    if (found := content.pop(_FORMAT_KEY, 1)) != _FORMAT:
        found = str(found)[:20]
        raise UserError(f"{path}: a weights file of format {found}; this version reads {_FORMAT}. Train it again.")
    return content.pop(_CHECKSUM_KEY, ""), content


def _checksum(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the metadata and of the name, dtype, shape and bytes of every tensor."""
    sha = hashlib.sha256(json.dumps(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _corrupted(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: corrupted weights file ({reason}). {_FIX}")
