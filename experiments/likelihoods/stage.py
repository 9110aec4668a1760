"""Training of one model, and the measurement of bounds in bits per dimension."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from experiments.likelihoods.likelihood_run import BoundsConfig, CapacityConfig, LikelihoodRun
from experiments.likelihoods.networks import LatentModel
from experiments.likelihoods.vqvae import VQVAE
from train.accelerator import to_device
from train.quantized_stage import QuantizedObjective, QuantizedStage
from vqvae2 import checkpoint
from vqvae2.data.images import ImageDataset, ImageSample, to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.pictures import interleave_rows, save_grid

_PREVIEW_IMAGES = 16


class LikelihoodObjective(QuantizedObjective):
    """The negative objective of a model in bits per dimension."""

    def __init__(self, network: LatentModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: ImageSample) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and terms for the log."""
        objective, terms = self.network.objective(batch.image, self.quantized)
        return -objective.mean() / (batch.image[0].numel() * math.log(2)), terms


class LikelihoodStage(QuantizedStage[LatentModel, LikelihoodObjective]):
    """Training of one model of a run."""

    monitor = "bits_per_dim"

    def __init__(self, run: LikelihoodRun, kind: str, capacity: CapacityConfig) -> None:
        self.run, self.config, self.name = run, run.config, run.stage(kind, capacity).path.name
        self.training_data, self.validation_data = run.images
        self.made_from = {"data": self.training_data.digest()}
        torch.manual_seed(self.config.training.seed)
        self.network = run.build(kind, capacity)
        self.quantizers = [self.network.quantizer] if isinstance(self.network, VQVAE) else []
        self.first_quantized_step = self.config.training.first_quantized_step
        self.objective = LikelihoodObjective(self.network)
        self.curves = {"bits per dimension": ["train/loss", "validation/bits_per_dim"]}

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the bound. Every process measures all images, so that all have the same value."""
        data, evaluation = self.validation_data, self.config.evaluation
        return {"bits_per_dim": bits_per_dim(self.network.bound, data, evaluation, accelerator.device)}

    def preview(self, path: Path) -> None:
        """Write held-out images, each above its reconstruction."""
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        originals = torch.stack([self.validation_data[index].image for index in range(count)])
        with torch.inference_mode():
            decoded = self.network.reconstruct(originals.to(self.network.head.weight.device))
        save_grid(path, *interleave_rows(originals, to_uint8(decoded.clamp(-1, 1)).cpu(), columns=8))

    def save(self, path: Path) -> None:
        checkpoint.save_module(path, self.network.kind, self.network, self.config, self.made_from)


@torch.inference_mode()
def bits_per_dim(
    bound: Callable[[Tensor], Tensor], data: ImageDataset, evaluation: BoundsConfig, device: torch.device
) -> float:
    """Return −bound / (C · H · W · ln 2), the mean over all images of a bound in nats per image.

    The random numbers of the bound depend on `evaluation.seed` only, and later ones do not depend on them.
    """
    sampler = SequentialBatchSampler(len(data), evaluation.batch_size)
    total, values = torch.zeros((), dtype=torch.float64, device=device), 0
    with torch.random.fork_rng():
        torch.manual_seed(evaluation.seed)
        for batch in load_batches(data, sampler, num_workers=0):
            images = to_device(batch.image, device)
            total += bound(images).double().sum()
            values += images.numel()
    return -float(total) / (values * math.log(2))
