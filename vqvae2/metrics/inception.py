"""Inception-v3 features for FID and related metrics, with the network, weights and preprocessing of pytorch-fid.

The network is the TensorFlow network of 2015-12-05 as ported by pytorch-fid. Metrics computed with other weights cannot
be compared with published numbers.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import UInt8
from pytorch_fid import inception as pytorch_fid
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d

from vqvae2.checkpoint import read_state_dict
from vqvae2.downloads import DOWNLOAD_ERRORS, cache_path, connection_timeout
from vqvae2.errors import UserError
from vqvae2.files import digest
from vqvae2.metrics.feature_extractor import FeatureExtractor, FeatureOutput, WeightsUnavailableError, check_images

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_DIGEST = "6726825d"  # first digits of its SHA-256
NUM_CLASSES = 1008
FEATURE_DIMS = (64, 192, 768, 2048)


class InceptionFeatures(FeatureExtractor):
    """Inception features of one of pytorch-fid's four depths."""

    name = "inception"
    classifier: Tensor

    def __init__(self, network: nn.Module, dims: int, weights_digest: str) -> None:
        """Take over `network`, built by `build_network`, with weights loaded. It is modified in place for speed.

        Raises:
            UserError: If `dims` is not the size of a feature layer.
        """
        super().__init__()
        if dims not in FEATURE_DIMS:
            raise UserError(f"--dims {dims}: must be one of {', '.join(map(str, FEATURE_DIMS))}")
        self.dims = dims
        self.weights_digest = weights_digest
        self.is_standard = weights_digest.startswith(WEIGHTS_DIGEST)
        network.eval().requires_grad_(False)
        # Folded batch normalization and channels-last take two thirds of the time on a CPU. Features are equal up to
        # float32 rounding.
        for module in network.modules():
            if isinstance(module, BasicConv2d) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.add_module("bn", nn.Identity())
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.stages = nn.ModuleList(_stages(network))
        self.register_buffer("classifier", network.get_parameter("fc.weight").detach())

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "n 3 h w"], logits: bool = False) -> FeatureOutput:
        """Return features (N, dims) of uint8 RGB images (N, 3, H, W) of any size.

        Preprocessing is that of pytorch-fid: scaling to [0, 1], bilinear resizing to 299 × 299 without antialiasing,
        scaling to [-1, 1]. Feature maps below 2048 dimensions are averaged over positions. `logits=True` also returns
        logits (N, 1008) without the bias, as is usual for the Inception score.

        Raises:
            UserError: If the images are not uint8 or do not have three channels.
        """
        check_images(images)
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
        return FeatureOutput(features, F.linear(x.flatten(1), self.classifier) if logits else None)


def load_inception(
    weights: Path | None = None, dims: int = 2048, device: torch.device | str = "cpu"
) -> InceptionFeatures:
    """Load the feature extractor from a .pth or .safetensors file, or else from torch's cache, or else download it.

    Raises:
        WeightsUnavailableError: If there are no weights and they cannot be downloaded.
        UserError: If the file is missing, corrupted or belongs to another network.
    """
    path = weights or _standard_weights()
    network = build_network()
    _load_weights(network, path)
    return InceptionFeatures(network, dims, digest(path)).to(device)


def build_network() -> nn.Module:
    """Build the FID Inception network with uninitialized weights: torchvision's with the blocks of pytorch-fid."""
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
    """Split the network at pytorch-fid's feature layers, of 64, 192, 768 and 2048 channels."""
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
    hint = f"Get {WEIGHTS_NAME} from {pytorch_fid.FID_WEIGHTS_URL} and pass it with --inception-weights."
    state = read_state_dict(path, hint=hint)
    expected = network.state_dict()
    # Old files lack `num_batches_tracked`, which is not used in evaluation mode.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    mismatched = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problem = (
        f"missing key `{missing[0]}`" if missing
        else f"unexpected key `{unexpected[0]}`" if unexpected
        else f"`{mismatched[0]}` has shape {tuple(state[mismatched[0]].shape)}, "
        f"expected {tuple(expected[mismatched[0]].shape)}"
        if mismatched else None
    )  # fmt: skip
    if problem:
        raise UserError(f"{path}: not weights of the FID Inception network ({problem}). {hint}")
    network.load_state_dict(state)


def _standard_weights() -> Path:
    """Return the path of the standard weights in torch's cache, downloading them if needed."""
    path = cache_path(WEIGHTS_NAME)
    if path.is_file():
        return path
    url = pytorch_fid.FID_WEIGHTS_URL
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with connection_timeout():
            torch.hub.download_url_to_file(url, str(path), hash_prefix=WEIGHTS_DIGEST, progress=False)
    except DOWNLOAD_ERRORS as error:
        raise WeightsUnavailableError(
            f"cannot download the Inception weights ({error}). Get {WEIGHTS_NAME} (about 91 MB, SHA-256 starts with "
            f"{WEIGHTS_DIGEST}) from {url} and pass it with --inception-weights, or put it at {path}."
        ) from None
    return path
