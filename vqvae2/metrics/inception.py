"""Inception-v3 features for FID and its relatives: the network, weights and preprocessing of pytorch-fid.

The network is TensorFlow's of 2015-12-05 as ported in pytorch-fid; other weights give numbers of another scale.
"""

import http.client
import socket
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, UInt8
from pytorch_fid import inception as pytorch_fid
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d

from vqvae2.errors import UserError
from vqvae2.files import digest

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_DIGEST = "6726825d"  # how its SHA-256 begins
NUM_CLASSES = 1008
FEATURE_DIMS = (64, 192, 768, 2048)
_TIMEOUT_S = 10


class WeightsUnavailableError(UserError):
    """The Inception weights are neither given, nor in torch's cache, nor to be had from the network."""


class InceptionOutput(NamedTuple):
    """What one pass gives: `features` in float32, and `logits` where they were asked for."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n 1008"] | None


class FeatureExtractor(nn.Module):
    """uint8 images → Inception features of one of pytorch-fid's four depths; in eval mode, without gradients.

    `weights_digest` is the SHA-256 of the weights file, for the record; `is_standard` tells whether it is the file that
    published numbers are made with.
    """

    classifier: Tensor

    def __init__(self, network: nn.Module, dims: int, weights_digest: str) -> None:
        """`network` is what `build_network` makes, with its weights loaded; it is changed for speed and kept."""
        super().__init__()
        if dims not in FEATURE_DIMS:
            raise UserError(f"--dims {dims}: Inception features have {', '.join(map(str, FEATURE_DIMS))} dimensions")
        self.dims = dims
        self.weights_digest = weights_digest
        self.is_standard = weights_digest.startswith(WEIGHTS_DIGEST)
        network.eval().requires_grad_(False)
        # Batch normalisation folded into the convolutions, and channels last: two thirds of the time on a CPU, the
        # same features to float32 rounding.
        for module in network.modules():
            if isinstance(module, BasicConv2d) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.add_module("bn", nn.Identity())
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.stages = nn.ModuleList(_stages(network))
        self.register_buffer("classifier", network.get_parameter("fc.weight").detach())

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where images are moved to."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "n 3 h w"], logits: bool = False) -> InceptionOutput:
        """Features (N, dims) of uint8 RGB images (N, 3, H, W) of any size, as pytorch-fid preprocesses them.

        Values become [0, 1], then bilinear 299×299 without antialiasing, then [-1, 1]. Below 2048 dimensions the map is
        averaged over its places. `logits` are (N, 1008) without the bias, as the Inception score has always used them.
        Raises UserError for another type or another number of channels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise UserError(f"images {tuple(images.shape)} of {images.dtype}; expected uint8 RGB (N, 3, H, W)")
        x = images.to(self.device).float() / 255
        x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        x = x.contiguous(memory_format=torch.channels_last)
        features = None
        for dims, stage in zip(FEATURE_DIMS, self.stages, strict=True):
            x = stage(x)
            if dims == self.dims:
                features = F.adaptive_avg_pool2d(x, 1).flatten(1)
                if not logits:
                    break
        assert features is not None
        return InceptionOutput(features, F.linear(x.flatten(1), self.classifier) if logits else None)


def load_inception(
    weights: Path | None = None, dims: int = 2048, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The feature extractor, from a file (.pth or .safetensors), else from torch's cache, else from the network.

    Raises WeightsUnavailableError where no weights are to be had, UserError where a file is damaged or of another network.
    """
    path = weights or _standard_weights()
    network = build_network()
    _load_weights(network, path)
    return FeatureExtractor(network, dims, digest(path)).to(device)


def build_network() -> nn.Module:
    """The FID Inception network, weights untouched: torchvision's with the blocks that pytorch-fid changes in it."""
    network: Any = torchvision.models.inception_v3(
        weights=None, num_classes=NUM_CLASSES, aux_logits=False, init_weights=False
    )
    network.Mixed_5b = pytorch_fid.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = pytorch_fid.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = pytorch_fid.FIDInceptionA(288, pool_features=64)
    for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(network, name, pytorch_fid.FIDInceptionC(768, channels_7x7=channels))
    network.Mixed_7b = pytorch_fid.FIDInceptionE_1(1280)
    network.Mixed_7c = pytorch_fid.FIDInceptionE_2(2048)
    built: nn.Module = network
    return built


def _stages(network: Any) -> list[nn.Sequential]:
    """The network cut where pytorch-fid reads features: after 64, 192, 768 and 2048 channels."""
    n = network
    return [
        nn.Sequential(n.Conv2d_1a_3x3, n.Conv2d_2a_3x3, n.Conv2d_2b_3x3, nn.MaxPool2d(3, stride=2)),
        nn.Sequential(n.Conv2d_3b_1x1, n.Conv2d_4a_3x3, nn.MaxPool2d(3, stride=2)),
        nn.Sequential(
            *(n.Mixed_5b, n.Mixed_5c, n.Mixed_5d),
            *(n.Mixed_6a, n.Mixed_6b, n.Mixed_6c, n.Mixed_6d, n.Mixed_6e),
        ),
        nn.Sequential(n.Mixed_7a, n.Mixed_7b, n.Mixed_7c, nn.AdaptiveAvgPool2d(1)),
    ]


def _load_weights(network: nn.Module, path: Path) -> None:
    state = _read_state(path)
    expected = network.state_dict()
    # Old files lack the counters of batches seen, which evaluation does not use.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misfits = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problem = (
        f"no `{missing[0]}`" if missing
        else f"`{unexpected[0]}` is not a part of it" if unexpected
        else f"`{misfits[0]}` has shape {tuple(state[misfits[0]].shape)}, not {tuple(expected[misfits[0]].shape)}"
        if misfits else None
    )  # fmt: skip
    if problem:
        raise UserError(f"{path}: not the weights of the FID Inception network ({problem}); expected {WEIGHTS_NAME}")
    network.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"--inception-weights: {path} is {'a folder' if path.is_dir() else 'missing'}; give a file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnpicklingError, SafetensorError):
        raise UserError(f"{path}: damaged, or not a file of weights alone; get {WEIGHTS_NAME} anew") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict (names and tensors); expected {WEIGHTS_NAME}")
    return state


def _standard_weights() -> Path:
    """The well-known file in torch's cache, fetched there if need be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if path.is_file():
        return path
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)  # torch.hub offers no other way to bound the wait for a connection
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            pytorch_fid.FID_WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_DIGEST, progress=False
        )
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsUnavailableError(
            f"no Inception weights ({error}): get {WEIGHTS_NAME} (about 91 MB, SHA-256 begins {WEIGHTS_DIGEST}) from "
            f"{pytorch_fid.FID_WEIGHTS_URL} and pass --inception-weights FILE, or put it at {path}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return path
