"""Trace training steps with fake CUDA tensors: after the first steps, the host must not wait for the device."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.guidance import make_decoder
from sampling.params import LevelSamplingParams
from sampling.row_sampler import RowSampler
from sampling.run_config import AutoencoderStageConfig
from sampling.wavefront_sampler import sample_wavefront
from tests.fake_cuda import CUDA, HostWaitError, fake_cuda, move_to_fake_cuda
from train.accelerator import to_device
from train.checkpoints import TrainingState
from train.early_stopping import EarlyStopping
from train.ema import ExponentialMovingAverage
from train.loop import AuxiliaryNetwork, TrainingStage, _make_units, _optimized, _update
from train.losses import AdversarialLoss, DiscriminatorObjective, PerceptualLoss
from train.metric_log import MetricLog
from train.signals import StopSignals
from train.stages.autoencoder import AutoencoderObjective, AutoencoderStage
from train.stages.prior import PriorObjective, PriorStage
from vqvae2 import AutoencoderConfig, LevelConfig, PixelCNNConfig, PixelSNAILConfig, PriorSpec, TransformerConfig
from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample
from vqvae2.models.discriminator import DiscriminatorConfig
from vqvae2.priors import PriorConfig
from vqvae2.priors.base import IncrementalDecoder, WavefrontDecoder
from vqvae2.quantizers import EMAConfig, FSQConfig, GradientConfig, QuantizerConfig, SimVQConfig
from vqvae2.training_config import (
    AdversarialLossConfig,
    AutoencoderLossConfig,
    AutoencoderTrainingConfig,
    PerceptualLossConfig,
    PriorTrainingConfig,
    TrainingConfig,
)

SETTINGS = {"steps": 100, "batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "ema_decay": 0.99}
CODEBOOK = {"codebook_size": 16, "code_dim": 4, "kmeans_init": False}
PRIORS = [
    PixelSNAILConfig(channels=8, residual_channels=8, blocks=2, layers=1, heads=2, kernel=3, output_layers=1),
    PixelCNNConfig(channels=8, layers=2, output_channels=8, kernel=3),
    TransformerConfig(channels=8, layers=2, heads=2),
]
FILTERS = LevelSamplingParams(temperature=0.9, top_k=4, top_p=0.9)
BOTTOM, TOP = (MapSpec(codebook_size=16, height=side, width=side) for side in (8, 4))


class AutoencoderSteps(AutoencoderStage):
    """The stage without data."""

    def __init__(self, quantizer: QuantizerConfig, with_losses: bool = False) -> None:
        levels = (LevelConfig(stride=4, quantizer=quantizer, dropout=0.1), LevelConfig(quantizer=quantizer))
        model = AutoencoderConfig(levels=levels, channels=8, residual_channels=4, residual_layers=1)
        self.network, self.pretrained, self.adversarial = model.build((32, 32)), None, None
        self.quantizers, self.first_quantized_step = self.network.quantizers, 0
        training = AutoencoderTrainingConfig(**SETTINGS, unquantized_steps=0)
        weight = 0.1 if with_losses else 0
        loss = AutoencoderLossConfig(
            perceptual=PerceptualLossConfig(weight=weight, network="efficientnet-lite0"),
            adversarial=AdversarialLossConfig(weight=weight, discriminator=DiscriminatorConfig(channels=8, layers=2)),
        )
        self.config = AutoencoderStageConfig(model=model, training=training, loss=loss)
        perceptual = None
        if with_losses:
            discriminator = loss.adversarial.discriminator.build((32, 32))
            self.adversarial = AdversarialLoss(loss.adversarial, discriminator)
            self.auxiliary = AuxiliaryNetwork("discriminator", DiscriminatorObjective(discriminator), 1e-4, (0.5, 0.9))
            perceptual = PerceptualLoss("efficientnet-lite0")
            perceptual._device = CUDA
        self.objective = AutoencoderObjective(self.network, loss, perceptual, self.adversarial)


class PriorSteps(PriorStage):
    """The stage without code stores."""

    def __init__(self, model: PriorConfig) -> None:
        self.network = model.build(PriorSpec(level=BOTTOM, coarser=(TOP,), num_classes=3))
        self.objective = PriorObjective(self.network, 0, label_dropout=0.1)

    def preview(self, path: Path) -> None:
        raise AssertionError("not part of a step")


def images() -> ImageSample:
    return ImageSample(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


def codes() -> CodeBatch:
    maps = tuple(torch.zeros(2, *level.shape, dtype=torch.int16) for level in (BOTTOM, TOP))
    return CodeBatch(maps, torch.zeros(2, dtype=torch.int32))


class Steps:
    """What `train.loop.train` does in a step that is not logged."""

    def __init__(
        self, stage: TrainingStage, config: TrainingConfig, batch: Callable[[], ImageSample | CodeBatch]
    ) -> None:
        self.stage, self.config, self.batch, self.step = stage, config, batch, 1
        self.accelerator = Accelerator(cpu=True, device_placement=False, gradient_accumulation_steps=2)
        move_to_fake_cuda(stage.objective.train())
        if stage.auxiliary:
            move_to_fake_cuda(stage.auxiliary.objective)
        if isinstance(stage.objective, AutoencoderObjective) and stage.objective.perceptual:
            move_to_fake_cuda(stage.objective.perceptual._network)
        self.units = _make_units(stage, config, self.accelerator)
        ema = ExponentialMovingAverage(stage.network, config.ema_decay)
        self.state = TrainingState(_optimized(stage, self.units), ema, EarlyStopping(None), None, {})
        self.log = MetricLog(Path(), writes=False)
        self.signals = StopSignals(self.accelerator)

    def run(self) -> None:
        batches = [to_device(self.batch(), CUDA) for _ in range(2)]
        self.log.add(_update(self.stage, self.units, batches, self.config, self.step, self.accelerator))
        self.state.advance(0.0)
        assert self.signals.received() is None
        self.step += 1


def trace(stage: TrainingStage, config: TrainingConfig, batch: Callable[[], ImageSample | CodeBatch]) -> None:
    """Run two steps, which allocate state, and two under the check."""
    with fake_cuda() as check:
        steps = Steps(stage, config, batch)
        for number in range(4):
            check.active = number >= 2
            steps.run()
        tensors = steps.state.tensors()
        assert len(tensors) > 20
        assert all(each.device == CUDA for each in tensors.values())
        with pytest.raises(HostWaitError):
            steps.log.read()


@pytest.mark.parametrize(
    "quantizer",
    [
        EMAConfig(**CODEBOOK),
        EMAConfig(**CODEBOOK, cosine=True, codebook_dim=2, gradient_estimator="rotation"),
        GradientConfig(**CODEBOOK),
        SimVQConfig(codebook_size=16, code_dim=4),
        FSQConfig(grid=(4, 4), code_dim=4),
    ],
    ids=lambda config: config.kind,
)
def test_autoencoder_step_does_not_wait(quantizer: QuantizerConfig) -> None:
    trace(AutoencoderSteps(quantizer), AutoencoderTrainingConfig(**SETTINGS), images)


def test_step_with_perceptual_and_adversarial_loss_does_not_wait() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    with mock.patch("train.losses.load_efficientnet_lite", return_value=mock.Mock(network=network)):
        stage = AutoencoderSteps(EMAConfig(**CODEBOOK), with_losses=True)
    trace(stage, AutoencoderTrainingConfig(**SETTINGS), images)


@pytest.mark.parametrize("model", PRIORS, ids=lambda config: config.kind)
def test_prior_step_does_not_wait(model: PriorConfig) -> None:
    trace(PriorSteps(model), PriorTrainingConfig(**SETTINGS), codes)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "params",
    [
        LevelSamplingParams(),
        LevelSamplingParams(temperature=0.9, top_k=4, top_p=0.9),
        LevelSamplingParams(temperature=0),
    ],
    ids=["plain", "filters", "argmax"],
)
@pytest.mark.parametrize("model", PRIORS, ids=lambda config: config.kind)
def test_captured_position_has_no_wait_and_no_tensor_on_the_cpu(
    model: PriorConfig, params: LevelSamplingParams, guidance_scale: float
) -> None:
    prior = model.build(PriorSpec(level=BOTTOM, coarser=(TOP,), num_classes=3)).eval().requires_grad_(False)
    with fake_cuda() as check, torch.no_grad():
        move_to_fake_cuda(prior)
        coarser = (torch.zeros(2, *TOP.shape, dtype=torch.int64, device=CUDA),)
        decoder = make_decoder(
            prior, 2, BOTTOM.height, coarser, torch.zeros(2, dtype=torch.int64, device=CUDA), guidance_scale
        )
        assert isinstance(decoder, IncrementalDecoder)
        sampler = RowSampler(decoder, params, 2, BOTTOM, CUDA)
        decoder.begin_row(0)
        sampler._next_position()
        check.active = True
        sampler._next_position()


@pytest.mark.parametrize(
    "model",
    [
        PixelSNAILConfig(channels=8, residual_channels=8, blocks=2, layers=1, kernel=3, attention=False),
        PixelSNAILConfig(channels=8, residual_channels=8, blocks=1, layers=1, heads=2, attention_order="wavefront"),
        TransformerConfig(channels=8, layers=2, heads=2, attention_order="wavefront"),
    ],
    ids=["pixelsnail", "pixelsnail-attention", "transformer"],
)
def test_wavefront_does_not_wait(model: PriorConfig) -> None:
    prior = model.build(PriorSpec(level=BOTTOM, coarser=(TOP,))).eval().requires_grad_(False)
    with fake_cuda() as check, torch.no_grad():
        move_to_fake_cuda(prior)
        coarser = (torch.zeros(2, *TOP.shape, dtype=torch.int64, device=CUDA),)
        decoder = make_decoder(prior, 2, BOTTOM.height, coarser, None)
        assert isinstance(decoder, WavefrontDecoder)
        codes = torch.zeros(2, *BOTTOM.shape, dtype=torch.int64, device=CUDA)
        check.active = True
        sample_wavefront(decoder, LevelSamplingParams(), torch.zeros(codes.shape, device=CUDA), codes)


def test_a_read_in_the_step_is_found() -> None:
    stage = PriorSteps(PixelCNNConfig(channels=8, layers=1, output_channels=8, kernel=3))
    stage.after_update = lambda _: print(float(stage.network.logits.conv.bias.sum()))
    with fake_cuda() as check:
        steps = Steps(stage, PriorTrainingConfig(**SETTINGS), codes)
        check.active = True
        with pytest.raises(HostWaitError, match="_local_scalar_dense reads a tensor on the device"):
            steps.run()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: torch.bincount(x.long()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x[torch.zeros(2, dtype=torch.int64)],
    ],
)
def test_operations_that_wait_are_found(operation: Callable[[Tensor], object]) -> None:
    with fake_cuda() as check:
        x = torch.zeros(3, device=CUDA)
        check.active = True
        with pytest.raises(HostWaitError):
            operation(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.to(CUDA, torch.bfloat16) + 1,
        lambda x: torch.zeros(3).to(x.device, non_blocking=True) + x,
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
        lambda x: x * torch.tensor(2.0),  # a number on the host
        lambda x: torch.where(x > 0, x, 0.0),
    ],
)
def test_operations_that_do_not_wait_are_allowed(operation: Callable[[Tensor], Tensor]) -> None:
    with fake_cuda() as check:
        x = torch.zeros(3, device=CUDA)
        check.active = True
        assert operation(x).device == CUDA
