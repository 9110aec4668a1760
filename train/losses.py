"""Optional losses of the autoencoder: perceptual and adversarial; and codebook usage during training.

The loss classes are not modules, so that the optimizer, the checkpoints and the DDP wrapper of the autoencoder never
include the weights of the perceptual network or of the discriminator.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae2.checkpoint import read_state_dict
from vqvae2.data.images import to_rgb
from vqvae2.distributed import all_reduce_sum, get_rank
from vqvae2.downloads import torchvision_weights
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.metrics.efficientnet_lite import MEAN, STD, load_efficientnet_lite
from vqvae2.quantizers import QuantizerOutput
from vqvae2.training_config import AdversarialLossConfig, PerceptualLossConfig

_KEY = "autoencoder.loss.perceptual"
_BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # torchvision names
# Smallest image side in pixels that the network's pooling allows. EfficientNet-Lite0 divides sizes by 32.
_MIN_SIZE = {"vgg": 16, "alex": 31, "squeeze": 17, "efficientnet-lite0": 32}
_EFFICIENTNET_BLOCKS = (0, 2, 4, 10, 15)  # the last block of each resolution
# Positions along the shorter side of a layer. Without smaller layers, the step of a 64 px decoder takes 0.7 × the time,
# and its reconstructions are better.
_MIN_POSITIONS = 4


def make_perceptual_loss(config: PerceptualLossConfig, size: tuple[int, int]) -> "PerceptualLoss | None":
    """Return the perceptual loss for images of `size`, or None if its weight is 0.

    Raises:
        UserError: If the images are too small, a package is missing, or the weights cannot be loaded.
    """
    if not config.weight:
        return None
    if (config.size or min(size)) < _MIN_SIZE[config.network]:
        raise UserError(
            f"{_KEY}.network: {config.network} needs images of at least {_MIN_SIZE[config.network]} pixels, "
            f"these are {size[0]} × {size[1]}. Set {_KEY}.size, or set {_KEY}.weight to 0."
        )
    return PerceptualLoss(config.network, Path(config.weights) if config.weights else None, config.size)


class PerceptualLoss:
    """Mean distance of two batches of images in the features of a frozen network.

    Always computed in float32: for similar images, it is a small difference of normalized features, which bfloat16 gets
    wrong by 20 % if the images differ by 1 %.
    """

    def __init__(self, network: str, weights: Path | None = None, size: int | None = None) -> None:
        self.active = True  # false before step `start`
        self._size = size
        self._network = (
            EfficientNetDistance(weights) if network == "efficientnet-lite0" else _make_lpips(network, weights)
        )
        self._network.eval().requires_grad_(False)
        self._device = torch.device("cpu")

    def __call__(self, made: Tensor, images: Tensor) -> Tensor:
        """Return the distance () of float32 images (B, C, H, W) in [-1, 1]; differentiable in both."""
        if made.device != self._device:
            self._network.to(made.device)
            self._device = made.device
        with torch.autocast(made.device.type, enabled=False):
            return self._network(self._prepare(made), self._prepare(images)).mean()

    def _prepare(self, images: Tensor) -> Tensor:
        images = to_rgb(images.float())
        if self._size is None or self._size == min(images.shape[2:]):
            return images
        scale = self._size / min(images.shape[2:])
        size = [round(scale * length) for length in images.shape[2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


class EfficientNetDistance(nn.Module):
    """Squared distance of normalized EfficientNet-Lite0 features.

    As in LPIPS, features are normalized to length 1 over their channels, squared differences are averaged over
    positions, and the distances of the layers are added. Channels have equal weights instead of learned ones. Layers
    with fewer than 4 × 4 positions are left out, so images of 64 px have four layers, and of 128 px all five.

    In training, images are shifted by 0 or 1 pixel in both directions at random. Otherwise the first layer, which has
    stride 2, sees half of the positions only, and the decoder learns a dotted pattern.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        loaded = load_efficientnet_lite("efficientnet-lite0", weights, f"{_KEY}.weights")
        network: Any = loaded.network
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance (B,) of images (B, 3, H, W) in [-1, 1]."""
        if first.requires_grad:
            down, right = torch.randint(2, (2,), device=first.device).bool().unbind()
            first, second = (_shift(images, down, right) for images in (first, second))
        layers = zip(self._features(first), self._features(second), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in layers]).sum(0)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the normalized features (B, C, H, W) of each layer."""
        x = self.stem(((127.5 * (images + 1) - MEAN) / STD).contiguous(memory_format=torch.channels_last))
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in _EFFICIENTNET_BLOCKS:
                yield F.normalize(x, dim=1)
                if min(x.shape[2:]) < 2 * _MIN_POSITIONS:  # the next layer has half of them
                    return


class AdversarialLoss:
    """Adversarial loss of the autoencoder. The discriminator's weights are constants in it."""

    def __init__(self, config: AdversarialLossConfig, discriminator: nn.Module) -> None:
        self.config, self.discriminator = config, discriminator
        self.active = False  # true from step `start` on
        self.latest: tuple[Tensor, Tensor] | None = None  # images and reconstructions, to train the discriminator

    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        """Return the generator's hinge loss (): lower if the discriminator rates the reconstructions as real."""
        self.latest = images, made.detach()
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        scores = torch.func.functional_call(self.discriminator, weights, (made,))
        return -scores.float().mean()


class DiscriminatorObjective(nn.Module):
    """Hinge loss of the discriminator (Lim and Ye 2017, arXiv 1705.02894)."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the mean scores of real and reconstructed images, which are detached."""
        # One pass over both, because DDP allows one forward call per backward pass.
        scores = self.discriminator(torch.cat(pair).detach()).float()
        real, made = scores.split([len(part) for part in pair])
        loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        return loss, {"score_real": real.mean(), "score_reconstructed": made.mean()}


class CodebookUsageTracker:
    """Codebook usage of the training batches since the last call of `take`, counted on the device."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes  # number of codes of each level, finest first
        self._usages: dict[str, CodebookUsage] = {}  # kept by `take`, so that compiled graphs need not allocate them
        self._is_empty = True

    def update(self, levels: Sequence[QuantizerOutput]) -> None:
        """Count the codes of a batch, one `QuantizerOutput` per level."""
        self._is_empty = False
        for (name, size), level in zip(self.sizes.items(), levels, strict=True):
            codes = level.codes.flatten()
            if name not in self._usages:
                self._usages[name] = CodebookUsage(size, codes.device)
            # Not `CodebookUsage.update`, because its range check and bincount wait for the device.
            self._usages[name].counts.index_add_(0, codes, torch.ones_like(codes))

    def take(self) -> dict[str, float]:
        """Return `usage_LEVEL` and `perplexity_LEVEL` over all processes, and reset. Every process must call this."""
        values: dict[str, float] = {}
        for name, usage in self._counted().items():
            usage.all_reduce()
            values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
            usage.counts.zero_()
        self._is_empty = True
        return values

    def pending(self) -> dict[str, list[int]]:
        """Return the code counts so far, over all processes. Every process must call this."""
        return {name: all_reduce_sum(usage.counts.clone()).tolist() for name, usage in self._counted().items()}

    def resume(self, pending: dict[str, list[int]], device: torch.device) -> None:
        """Restore code counts. Only rank 0 keeps them, because the counts of all processes are summed later."""
        self._is_empty = not pending
        for name, counts in pending.items():
            if len(counts) != self.sizes.get(name):
                raise UserError(
                    f"checkpoint: {len(counts)} counts of level {name[:80]!r}, expected {self.sizes.get(name)}. "
                    "Delete the newest checkpoint of the autoencoder and run the same command again."
                )
            self._usages[name] = usage = CodebookUsage(self.sizes[name])
            usage.counts = torch.tensor(counts, device=device) * (get_rank() == 0)

    def _counted(self) -> dict[str, CodebookUsage]:
        return {} if self._is_empty else self._usages


def _shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift images (B, C, H, W) by a pixel if `down` () or `right` () is true, with reflection at the border."""
    images = torch.where(down, F.pad(images, (0, 0, 1, 0), mode="reflect")[:, :, :-1], images)
    return torch.where(right, F.pad(images, (1, 0, 0, 0), mode="reflect")[:, :, :, :-1], images)


def _make_lpips(network: str, weights: Path | None) -> nn.Module:
    try:
        from lpips import LPIPS
    except ImportError:
        raise UserError(
            f"{_KEY}: needs the package `lpips`; pip install 'vqvae2[perceptual]', or set {_KEY}.weight to 0"
        ) from None
    state = _download(network) if weights is None else _read(weights)
    with warnings.catch_warnings():  # lpips calls torchvision in a way that it deprecates
        warnings.simplefilter("ignore", UserWarning)
        lpips: nn.Module = LPIPS(net=network, pnet_rand=True, verbose=False)
    _fill(lpips.get_submodule("net"), state, weights, network)
    return lpips


def _read(path: Path) -> dict[str, Tensor]:
    return read_state_dict(path, f"{_KEY}.weights", "Give a file of torchvision's weights.")


def _download(network: str) -> dict[str, Tensor]:
    """Return the ImageNet weights that lpips itself would download."""
    alternative = f"give a file of them with {_KEY}.weights"
    return torchvision_weights(_BACKBONES[network], "IMAGENET1K_V1", label=_KEY, alternative=alternative).state_dict


def _fill(net: nn.Module, state: dict[str, Tensor], path: Path | None, network: str) -> None:
    """Load torchvision's `features.N.…` into lpips's `sliceK.N.…`; what classifies is left out."""
    wanted = {name: f"features.{name.split('.', 1)[1]}" for name in net.state_dict()}
    for name, tensor in net.state_dict().items():
        found = state.get(wanted[name])
        if found is None or found.shape != tensor.shape:
            problem = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(tensor.shape)}"
            raise UserError(
                f"{_KEY}.weights: {path}: not the weights of torchvision's {_BACKBONES[network]} "
                f"(`{wanted[name]}` {problem})"
            )
    net.load_state_dict({name: state[key] for name, key in wanted.items()})
