"""Optional losses of the autoencoder: perceptual (LPIPS) and adversarial; and codebook usage during training.

The loss classes are not modules, so that the optimizer, the checkpoints and the DDP wrapper of the autoencoder never
include the weights of the perceptual network or of the discriminator.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae2.checkpoint import read_state_dict
from vqvae2.data.images import to_rgb
from vqvae2.distributed import all_reduce_sum, get_rank
from vqvae2.downloads import torchvision_weights
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.quantizers import QuantizerOutput
from vqvae2.training_config import AdversarialLossConfig, PerceptualLossConfig

_KEY = "autoencoder.loss.perceptual"
_BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # torchvision names
_MIN_SIZE = {"vgg": 16, "alex": 31, "squeeze": 17}  # smallest image side in pixels that the network's pooling allows


def make_perceptual_loss(config: PerceptualLossConfig, size: tuple[int, int]) -> "PerceptualLoss | None":
    """Return the perceptual loss for images of `size`, or None if its weight is 0.

    Raises:
        UserError: If the images are too small, the package `lpips` is missing, or the weights cannot be loaded.
    """
    if not config.weight:
        return None
    if min(size) < _MIN_SIZE[config.network]:
        raise UserError(
            f"{_KEY}.network: {config.network} needs images of at least {_MIN_SIZE[config.network]} pixels, "
            f"these are {size[0]} × {size[1]}. Set {_KEY}.weight to 0."
        )
    return PerceptualLoss(config.network, Path(config.weights) if config.weights else None)


class PerceptualLoss:
    """Mean LPIPS distance of two batches of images, computed by a frozen network.

    Always computed in float32: for similar images, LPIPS is a small difference of normalized features, which bfloat16
    gets wrong by 20 % if the images differ by 1 %.
    """

    def __init__(self, network: str, weights: Path | None = None) -> None:
        try:
            from lpips import LPIPS
        except ImportError:
            raise UserError(
                f"{_KEY}: needs the package `lpips`; pip install 'vqvae2[perceptual]', or set {_KEY}.weight to 0"
            ) from None
        state = _download(network) if weights is None else _read(weights)
        with warnings.catch_warnings():  # lpips calls torchvision in a way that it deprecates
            warnings.simplefilter("ignore", UserWarning)
            self._network: nn.Module = LPIPS(net=network, pnet_rand=True, verbose=False)
        _fill(self._network.get_submodule("net"), state, weights, network)
        self._network.eval().requires_grad_(False)
        self._device = torch.device("cpu")

    def __call__(self, made: Tensor, images: Tensor) -> Tensor:
        """Return the distance () of float32 images (B, C, H, W) in [-1, 1]; differentiable in both."""
        if made.device != self._device:
            self._network.to(made.device)
            self._device = made.device
        with torch.autocast(made.device.type, enabled=False):
            return self._network(to_rgb(made.float()), to_rgb(images.float())).mean()


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
        self._usages: dict[str, CodebookUsage] = {}

    def update(self, levels: Sequence[QuantizerOutput]) -> None:
        """Count the codes of a batch, one `QuantizerOutput` per level."""
        for (name, size), level in zip(self.sizes.items(), levels, strict=True):
            codes = level.codes.flatten()
            if name not in self._usages:
                self._usages[name] = CodebookUsage(size, codes.device)
            usage = self._usages[name]
            usage.counts = usage.counts.to(codes.device)  # restored counts are on the CPU
            # Not `CodebookUsage.update`, because its range check and bincount wait for the device.
            usage.counts.index_add_(0, codes, torch.ones_like(codes))

    def take(self) -> dict[str, float]:
        """Return `usage_LEVEL` and `perplexity_LEVEL` over all processes, and reset. Every process must call this."""
        values: dict[str, float] = {}
        for name, usage in self._usages.items():
            usage.all_reduce()
            values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
        self._usages = {}
        return values

    def pending(self) -> dict[str, list[int]]:
        """Return the code counts so far, over all processes. Every process must call this."""
        return {name: all_reduce_sum(usage.counts.clone()).tolist() for name, usage in self._usages.items()}

    def resume(self, pending: dict[str, list[int]]) -> None:
        """Restore code counts. Only rank 0 keeps them, because the counts of all processes are summed later."""
        for name, counts in pending.items():
            if len(counts) != self.sizes.get(name):
                raise UserError(
                    f"checkpoint: {len(counts)} counts of level {name[:80]!r}, expected {self.sizes.get(name)}. "
                    "Delete the newest checkpoint of the autoencoder and run the same command again."
                )
            self._usages[name] = usage = CodebookUsage(self.sizes[name])
            usage.counts = torch.tensor(counts) * (get_rank() == 0)


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
