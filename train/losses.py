"""What the autoencoder may be trained on beside its quantizers' terms: pixels, perceptual distance, an adversary.

These belong to training, not to the library: a trained autoencoder is the same object whatever taught it. Neither the
perceptual network nor the adversary is a Module here, so no optimizer, checkpoint or wrapper of the autoencoder's own
objective ever sees their weights.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vqvae2.checkpoint import read_state_dict
from vqvae2.config import Config
from vqvae2.data.images import to_rgb
from vqvae2.distributed import all_reduce_sum, get_rank
from vqvae2.downloads import torchvision_weights
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.models.discriminator import DiscriminatorConfig
from vqvae2.quantizers import QuantizerOutput

_KEY = "autoencoder.loss.perceptual"
_BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # torchvision's names
_SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}  # sides in pixels that their pooling still takes


class PerceptualConfig(Config):
    """The perceptual term, LPIPS (Zhang et al. 2018, arXiv 1801.03924)."""

    weight: float = Field(default=0.0, ge=0, description="of the term in the loss; 0 leaves it out")
    network: Literal["vgg", "alex", "squeeze"] = Field(default="vgg", description="whose features are compared")
    weights: str | None = Field(
        default=None, description="file of that network's ImageNet weights from torchvision; fetched where not given"
    )

    def build(self, size: tuple[int, int]) -> "PerceptualDistance | None":
        """The distance for images of `size`, None at weight 0; UserError where package or weights cannot be had."""
        if not self.weight:
            return None
        if min(size) < _SMALLEST[self.network]:
            raise UserError(
                f"{_KEY}.network: {self.network} needs images of {_SMALLEST[self.network]} pixels or more, "
                f"these have {size[0]} × {size[1]}; set {_KEY}.weight to 0"
            )
        return PerceptualDistance(self.network, Path(self.weights) if self.weights else None)


class AdversarialConfig(Config):
    """The adversarial term and its discriminator, which is trained beside the autoencoder (Esser et al. 2021)."""

    weight: float = Field(default=0.0, ge=0, description="of the term in the loss; 0 leaves it out")
    start: int = Field(default=0, ge=0, description="step from which term and discriminator take part")
    learning_rate: float = Field(default=1e-4, gt=0, description="of the discriminator, at its peak")
    betas: tuple[float, float] = Field(default=(0.5, 0.9), description="of the discriminator's Adam")
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class LossConfig(Config):
    """What the reconstruction is judged by; the default is the papers' mean squared error alone."""

    pixel: Literal["mse", "l1"] = "mse"
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()

    @property
    def pixel_term(self) -> str:
        """The name of the pixel term in the log."""
        return "l1" if self.pixel == "l1" else "reconstruction"

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that take part, the discriminator's own loss with them."""
        perceptual = ("perceptual",) if self.perceptual.weight else ()
        return (self.pixel_term, *perceptual, *(("adversarial", "discriminator") if self.adversarial.weight else ()))


class PerceptualDistance:
    """Mean LPIPS distance of two batches of images, by a frozen network.

    Always in float32: the distance of two images much alike is a small difference of features of length one, which
    bfloat16 gets wrong by a fifth where the images differ by a hundredth.
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
        """The distance () of float32 images (B, C, H, W) in [-1, 1]; gradients reach both."""
        if made.device != self._device:
            self._network.to(made.device)
            self._device = made.device
        with torch.autocast(made.device.type, enabled=False):
            return self._network(to_rgb(made.float()), to_rgb(images.float())).mean()


class Adversary:
    """The discriminator as the autoencoder meets it: a judge whose weights are constants."""

    def __init__(self, config: AdversarialConfig, discriminator: nn.Module) -> None:
        self.config, self.discriminator = config, discriminator
        self.active = False  # from step `start` on
        self.latest: tuple[Tensor, Tensor] | None = None  # images and reconstructions, for the discriminator to learn

    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        """The autoencoder's side of the hinge loss (): the lower, the more its reconstructions pass for real."""
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
        """The loss, and the mean scores, for real and reconstructed images; no gradient leaves through either."""
        # One pass over both: a wrapped module may be called once before each backward pass.
        scores = self.discriminator(torch.cat(pair).detach()).float()
        real, made = scores.split([len(part) for part in pair])
        loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        return loss, {"score_real": real.mean(), "score_reconstructed": made.mean()}


class TrainingUsage:
    """How the codes of training were used since the last question, gathered on the device without waiting for it."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes  # number of codes of each level, finest first
        self._usages: dict[str, CodebookUsage] = {}

    def update(self, levels: Sequence[QuantizerOutput]) -> None:
        """Count the codes of a batch, one `QuantizerOutput` a level."""
        for (name, size), level in zip(self.sizes.items(), levels, strict=True):
            codes = level.codes.flatten()
            if name not in self._usages:
                self._usages[name] = CodebookUsage(size, codes.device)
            usage = self._usages[name]
            usage.counts = usage.counts.to(codes.device)  # from a checkpoint they come on the processor
            # Not `CodebookUsage.update`, whose check of the range, as its bincount, asks the device for an answer.
            usage.counts.index_add_(0, codes, torch.ones_like(codes))

    def take(self) -> dict[str, float]:
        """`usage_LEVEL` and `perplexity_LEVEL` over all processes, each of which must ask; then begin anew."""
        values: dict[str, float] = {}
        for name, usage in self._usages.items():
            usage.all_reduce()
            values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
        self._usages = {}
        return values

    def pending(self) -> dict[str, list[int]]:
        """The histograms by now, over all processes, each of which must ask."""
        return {name: all_reduce_sum(usage.counts.clone()).tolist() for name, usage in self._usages.items()}

    def resume(self, pending: dict[str, list[int]]) -> None:
        """Go on from such histograms; one process takes them, since they will be added up."""
        for name, counts in pending.items():
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
