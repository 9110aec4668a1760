"""Compare a training step on a GPU with one on a CPU, without host waits. The comparison also runs on the CPU alone."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from train.accelerator import to_device
from train.stages.autoencoder import AutoencoderObjective
from train.stages.prior import PriorObjective
from vqvae2 import AutoencoderConfig, LevelConfig, PixelCNNConfig, PixelSNAILConfig, PriorSpec, TransformerConfig
from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample
from vqvae2.quantizers import EMAConfig, GradientConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is available")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]
BOTTOM, TOP = (MapSpec(codebook_size=16, height=side, width=side) for side in (8, 4))
PRIORS = [
    PixelSNAILConfig(channels=16, residual_channels=16, blocks=2, layers=1, heads=2, kernel=3, dropout=0),
    PixelCNNConfig(channels=16, layers=2, output_channels=16, kernel=3, dropout=0),
    TransformerConfig(channels=16, layers=2, heads=2, dropout=0),
]


def autoencoder() -> tuple[nn.Module, ImageSample]:
    codebook = {"codebook_size": 16, "code_dim": 4, "kmeans_init": False}
    levels = LevelConfig(stride=4, quantizer=EMAConfig(**codebook)), LevelConfig(quantizer=GradientConfig(**codebook))
    network = AutoencoderConfig(levels=levels, channels=16, residual_channels=8, residual_layers=1).build((32, 32))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    return AutoencoderObjective(network), ImageSample(images, torch.zeros(4, dtype=torch.int64))  # pyright: ignore


def prior(config: PixelSNAILConfig | PixelCNNConfig | TransformerConfig) -> tuple[nn.Module, CodeBatch]:
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
