"""Import of checkpoints of the widely used PyTorch VQ-VAE-2 (rosinality/vq-vae-2-pytorch).

Its two-level network is the same as the default `Autoencoder`.
"""

from pathlib import Path

import torch
from torch import Tensor

from vqvae2.checkpoint import read_state_dict
from vqvae2.errors import UserError
from vqvae2.models.autoencoder import Autoencoder, AutoencoderConfig

# Prefixes of their names → ours. Layer numbers inside the stacks are the same.
_PREFIXES = {
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
# Their codebooks are (D, K), ours are (K, D).
_CODEBOOK_NAMES = {"embed": "embedding", "cluster_size": "ema_cluster_size", "embed_avg": "ema_embedding_sum"}


def import_autoencoder(path: Path, size: tuple[int, int] = (256, 256)) -> Autoencoder:
    """Import an autoencoder from a .pt file: a state dict, optionally under the key `model`, or of a wrapped module.

    Channel counts are inferred from tensor shapes. `size` is the (height, width) of the images, which the file does not
    contain. Only tensors are unpickled.

    Raises:
        UserError: If the file has another layout. The message names the first key that does not match.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in read_state_dict(path, key="model").items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise _mismatch(path, f"`{name}` is not made of finite floating-point numbers")
        tensor = tensor.float()
        state[_our_name(name.removeprefix("module."), path)] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    model = _infer_config(state, path).build(size).eval()
    expected_state = model.state_dict()
    for name, expected in expected_state.items():
        buffer = name.rsplit(".", 1)[-1]
        if buffer in ("initialized", "updates"):  # not part of their checkpoints
            state[name] = torch.tensor(True) if buffer == "initialized" else expected
        elif name not in state:
            raise _mismatch(path, f"missing key `{_their_name(name)}`")
        elif state[name].shape != expected.shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(expected.shape)}"
            raise _mismatch(path, f"`{_their_name(name)}` has shape {shapes}")
    for name in state:
        if name not in expected_state:
            raise _mismatch(path, f"unexpected key `{_their_name(name)}`")
    model.load_state_dict(state)
    return model


def _mismatch(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: not a checkpoint of rosinality/vq-vae-2-pytorch: {problem}.")


def _our_name(name: str, path: Path) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            return ours + _CODEBOOK_NAMES.get(rest, rest.replace(".conv.", ".body."))
    raise _mismatch(path, f"unexpected key `{name}`")


def _their_name(name: str) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            codebook_names = {ours: theirs for theirs, ours in _CODEBOOK_NAMES.items()}
            return theirs + codebook_names.get(rest, rest.replace(".body.", ".conv."))
    return name


def _infer_config(state: dict[str, Tensor], path: Path) -> AutoencoderConfig:
    """Infer channel counts and codebook sizes from tensor shapes."""
    keys = (
        "pre_quant_convs.1.weight",
        "quantizers.0.embedding",
        "quantizers.1.embedding",
        "encoders.0.5.body.1.weight",
    )
    for key in keys:
        if key not in state:
            raise _mismatch(path, f"missing key `{_their_name(key)}`")
        if state[key].ndim != (2 if key.endswith("embedding") else 4):
            raise _mismatch(path, f"`{_their_name(key)}` has shape {tuple(state[key].shape)}")
    levels = [
        {"stride": stride, "quantizer": {"kind": "ema", "codebook_size": size, "code_dim": dim}}
        for stride, (size, dim) in zip((4, 2), (state[key].shape for key in keys[1:3]), strict=True)
    ]
    residual = [name for name in state if name.startswith("encoders.0.") and name.endswith(".body.1.weight")]
    config = {
        "levels": levels,
        "channels": state[keys[0]].shape[1],
        "residual_channels": state[keys[3]].shape[0],
        "residual_layers": len(residual),
    }
    return AutoencoderConfig.from_dict(config, str(path))
