"""Reading checkpoints of the widely used PyTorch VQ-VAE-2, whose two-level network is this project's default one."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from vqvae2.errors import UserError
from vqvae2.models.autoencoder import Autoencoder, AutoencoderConfig, LevelConfig
from vqvae2.quantizers import EMAConfig

# Their name → ours. Layer numbers inside the stacks are the same.
_PARTS = {
    "enc_b.blocks.": "encoders.0.",
    "enc_t.blocks.": "encoders.1.",
    "dec_t.blocks.": "decoders.0.",
    "dec.blocks.": "decoder.",
    "quantize_conv_b.": "pre_quant_convs.0.",
    "quantize_conv_t.": "pre_quant_convs.1.",
    "upsample_t.": "upsamplers.0.0.",
    "quantize_b.": "quantizers.0.",
    "quantize_t.": "quantizers.1.",
}
# Their codebooks are (D, K), ours (K, D).
_CODEBOOK = {"embed": "embedding", "cluster_size": "ema_cluster_size", "embed_avg": "ema_embedding_sum"}


def import_autoencoder(path: Path, size: tuple[int, int] = (256, 256)) -> Autoencoder:
    """The autoencoder in a .pt file: a bare state dict or one under `model`, with or without `module.` prefixes.

    Widths are read from the shapes; `size` is that of the images, which such a file does not tell. Nothing but tensors
    is unpickled. Raises UserError for a file of another layout, naming the first key that does not fit.
    """
    theirs = _read(path)
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        ours[_rename(name, path)] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    model = _config(ours, path).build(size).eval()
    for name, expected in model.state_dict().items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("initialized", "updates"):  # facts that the other program does not keep
            ours[name] = torch.tensor(True) if kind == "initialized" else expected
        elif name not in ours:
            raise UserError(f"{path}: not a checkpoint of that VQ-VAE-2: `{_their_name(name)}` is missing")
        elif ours[name].shape != expected.shape:
            raise UserError(
                f"{path}: not a checkpoint of that VQ-VAE-2: `{_their_name(name)}` has shape "
                f"{tuple(ours[name].shape)}, expected {tuple(expected.shape)}"
            )
    for name in ours:
        if name not in model.state_dict():
            raise UserError(f"{path}: not a checkpoint of that VQ-VAE-2: `{_their_name(name)}` has no place in it")
    model.load_state_dict(ours)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of weights alone ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict (tensors by name)")
    return {str(name).removeprefix("module."): tensor.float() for name, tensor in state.items()}


def _rename(name: str, path: Path) -> str:
    for theirs, ours in _PARTS.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            return ours + _CODEBOOK.get(rest, rest.replace(".conv.", ".body."))
    raise UserError(f"{path}: not a checkpoint of that VQ-VAE-2: `{name}` has no place in it")


def _their_name(name: str) -> str:
    for theirs, ours in _PARTS.items():
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            codebook = {ours: theirs for theirs, ours in _CODEBOOK.items()}
            return theirs + codebook.get(rest, rest.replace(".body.", ".conv."))
    return name


def _config(ours: dict[str, Tensor], path: Path) -> AutoencoderConfig:
    """The widths that the shapes tell."""
    keys = (
        "pre_quant_convs.1.weight",
        "quantizers.0.embedding",
        "quantizers.1.embedding",
        "encoders.0.5.body.1.weight",
    )
    for key in keys:
        if key not in ours:
            raise UserError(f"{path}: not a checkpoint of that VQ-VAE-2: `{_their_name(key)}` is missing")
    strides = zip((4, 2), keys[1:3], strict=True)
    levels = tuple(
        LevelConfig(stride=stride, quantizer=EMAConfig(codebook_size=ours[key].shape[0], code_dim=ours[key].shape[1]))
        for stride, key in strides
    )
    residual = [name for name in ours if name.startswith("encoders.0.") and name.endswith(".body.1.weight")]
    return AutoencoderConfig(
        levels=levels,
        channels=ours[keys[0]].shape[1],
        residual_channels=ours[keys[3]].shape[0],
        residual_layers=len(residual),
    )
