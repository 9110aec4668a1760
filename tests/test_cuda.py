"""Compare training steps and samples on a GPU with those on a CPU. Comparisons also run on the CPU alone."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sampling import row_sampler
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, PartialCodes, sample_level
from tests.test_sample_level import Replay
from train.accelerator import to_device
from train.stages.autoencoder import AutoencoderObjective
from train.stages.prior import PriorObjective
from vqvae2 import AutoencoderConfig, LevelConfig, PixelCNNConfig, PixelSNAILConfig, PriorSpec, TransformerConfig
from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample
from vqvae2.priors import PriorConfig
from vqvae2.quantizers import EMAConfig, GradientConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is available")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]
BOTTOM, TOP = (MapSpec(codebook_size=16, height=side, width=side) for side in (8, 4))
PRIORS = [
    PixelSNAILConfig(channels=16, residual_channels=16, blocks=2, layers=1, heads=2, kernel=3, dropout=0),
    PixelCNNConfig(channels=16, layers=2, output_channels=16, kernel=3, dropout=0),
    TransformerConfig(channels=16, layers=2, heads=2, dropout=0),
]
WAVEFRONT = [
    PixelSNAILConfig(channels=16, residual_channels=16, blocks=2, layers=1, heads=2, attention_order="wavefront"),
    TransformerConfig(channels=16, layers=2, heads=2, attention_order="wavefront"),
]
SAMPLED = [
    *(pytest.param(config, id=config.kind) for config in PRIORS),
    *(pytest.param(config, id=f"{config.kind}-wavefront") for config in WAVEFRONT),
]


def autoencoder() -> tuple[nn.Module, ImageSample]:
    codebook = {"codebook_size": 16, "code_dim": 4, "kmeans_init": False}
    levels = LevelConfig(stride=4, quantizer=EMAConfig(**codebook)), LevelConfig(quantizer=GradientConfig(**codebook))
    network = AutoencoderConfig(levels=levels, channels=16, residual_channels=8, residual_layers=1).build((32, 32))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    return AutoencoderObjective(network), ImageSample(images, torch.zeros(4, dtype=torch.int64))  # pyright: ignore


def prior(config: PriorConfig) -> tuple[nn.Module, CodeBatch]:
    network = config.build(PriorSpec(level=BOTTOM, coarser=(TOP,), num_classes=3))
    maps = tuple(torch.randint(16, (4, *level.shape)) for level in (BOTTOM, TOP))
    return PriorObjective(network, 0), CodeBatch(maps, torch.randint(3, (4,)))


NETWORKS = [autoencoder, *(lambda config=config: prior(config) for config in PRIORS)]


def step(make: Callable[[], tuple[nn.Module, ImageSample | CodeBatch]], device: str, dtype: torch.dtype) -> list[float]:
    """Return the loss and the norms of the gradients of the second step; on a GPU, fail if it waits for the device."""
    torch.manual_seed(0)
    objective, batch = make()
    objective.train().to(device)
    batch = to_device(batch, torch.device(device))
    values = torch.zeros(0)
    for number in range(2):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if number else "default")
        objective.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch)
        loss.backward()
        values = torch.stack(
            [loss.detach().float(), *(p.grad.norm() for p in objective.parameters() if p.grad is not None)]
        )
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return values.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", NETWORKS, ids=["autoencoder", *(config.kind for config in PRIORS)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_step_equals_that_of_a_cpu(
    make: Callable[[], tuple[nn.Module, ImageSample | CodeBatch]], device: str, dtype: torch.dtype, tolerance: float
) -> None:
    expected = step(make, "cpu", torch.float32)
    found = step(make, device, dtype)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert torch.tensor(found).norm().item() == pytest.approx(torch.tensor(expected).norm().item(), rel=3 * tolerance)


@pytest.fixture
def tf32_off() -> Iterator[None]:
    """Turn off TensorFloat-32 of convolutions, which is on by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def sample(config: PriorConfig, device: str, params: LevelSamplingParams, keep: bool) -> Tensor:
    torch.manual_seed(0)
    prior = config.build(PriorSpec(level=BOTTOM, coarser=(TOP,), num_classes=3)).eval().requires_grad_(False)
    coarser, labels = torch.randint(16, (5, *TOP.shape)), torch.randint(3, (5,))
    partial = PartialCodes(torch.randint(16, (5, *BOTTOM.shape)), torch.rand(5, *BOTTOM.shape) < 0.3)
    prior, coarser, labels = prior.to(device), coarser.to(device), labels.to(device)
    partial = PartialCodes(*(part.to(device) for part in partial)) if keep else None
    return sample_level(prior, Noise(0, range(5), 0), params, (coarser,), labels, partial).cpu()


@pytest.mark.usefixtures("tf32_off")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", SAMPLED)
@pytest.mark.parametrize(
    ("params", "keep"),
    [
        (LevelSamplingParams(), False),
        (LevelSamplingParams(temperature=0.9, top_k=8, top_p=0.9), False),
        (LevelSamplingParams(guidance_scale=2), True),
    ],
    ids=["plain", "filters", "guided, partial"],
)
def test_samples_equal_those_of_a_cpu(
    config: PriorConfig, params: LevelSamplingParams, keep: bool, device: str
) -> None:
    equal = sample(config, device, params, keep) == sample(config, "cpu", params, keep)
    assert equal.double().mean() > 0.95  # a code near the border of two others changes the following ones


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("config", PRIORS, ids=lambda config: config.kind)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_captured_graph_samples_the_same_codes(
    config: PriorConfig, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = LevelSamplingParams(guidance_scale=guidance_scale, top_p=0.9)
    captured = sample(config, "cuda", params, False)
    monkeypatch.setattr(row_sampler, "capture", Replay)
    assert torch.equal(captured, sample(config, "cuda", params, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", SAMPLED)
def test_bfloat16_weights_can_be_sampled(config: PriorConfig, device: str) -> None:
    codes = sample(config, device, LevelSamplingParams(dtype="bf16"), False)
    assert codes.unique().numel() > 8


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("make", NETWORKS, ids=["autoencoder", *(config.kind for config in PRIORS)])
def test_compiled_step_equals_the_eager_one(make: Callable[[], tuple[nn.Module, ImageSample | CodeBatch]]) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        objective, batch = make()
        objective.train().cuda()
        called = torch.compile(objective) if compiled else objective
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = called(to_device(batch, torch.device("cuda")))
        loss.backward()
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.cuda
@needs_gpu
def test_capture_beside_a_thread_that_pins_memory() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(4000, 4096)), batch_size=8, num_workers=2, pin_memory=True)
    x = torch.zeros(1000, device="cuda")
    for number, _ in enumerate(loader):
        if number % 20 == 0:
            row_sampler.capture(lambda: x.add_(1), x.device).replay()
    assert float(x[0]) == float(x[-1]) > 0


@pytest.mark.cuda
@needs_gpu
def test_stages_with_nccl_and_fp16(tiny_config: Path, tmp_path: Path) -> None:
    tiny_config.write_text(tiny_config.read_text().replace("{steps: ", "{mixed_precision: fp16, steps: "))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "vqvae2"]
    command += ["run", str(tiny_config), "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
