"""Stage 1: train the autoencoder on images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sampling.evaluation.training_checks import codebook_warnings
from train.loop import AuxiliaryNetwork, Stage, to_device, train
from train.losses import Adversary, DiscriminatorObjective, LossConfig, PerceptualDistance, TrainingUsage
from train.run import Run, open_run, print_main
from vqvae2.data.images import ImageDataset, ImageSample, open_datasets, to_float, to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.metrics.reconstruction import ReconstructionStatistics
from vqvae2.models import Autoencoder
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.quantizers import GradientQuantizer
from vqvae2.run_folder import level_names

_PREVIEW_IMAGES = 16


class AutoencoderObjective(nn.Module):
    """Error of the reconstruction plus what the quantizers add (van den Oord et al. 2017, eq. 3)."""

    def __init__(
        self,
        network: Autoencoder,
        loss: LossConfig | None = None,
        perceptual: PerceptualDistance | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.network, self.config = network, loss or LossConfig()
        self.perceptual, self.adversary = perceptual, adversary
        self.names = level_names(len(network.map_specs))
        self.usage = TrainingUsage(
            {name: level.codebook_size for name, level in zip(self.names, network.map_specs, strict=True)}
        )
        self.quantized = True

    def forward(self, batch: ImageSample) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, unweighted, for uint8 images (B, C, H, W)."""
        images = to_float(batch.image)
        reconstruction = self.network(images, self.quantized)
        made = reconstruction.images.float()
        difference = made - images
        loss = difference.abs().mean() if self.config.pixel == "l1" else difference.square().mean()
        terms = {self.config.pixel_term: loss}
        for name, level in zip(self.names, reconstruction.levels, strict=True):
            loss = loss + level.loss
            terms |= {f"{term}_{name}": value for term, value in level.loss_terms.items()}
        if self.perceptual:
            terms["perceptual"] = self.perceptual(made, images)
            loss = loss + self.config.perceptual.weight * terms["perceptual"]
        if self.adversary and self.adversary.active:
            terms["adversarial"] = self.adversary(images, made)
            loss = loss + self.config.adversarial.weight * terms["adversarial"]
        if self.network.training and self.quantized:
            self.usage.update(reconstruction.levels)
        return loss, terms


class AutoencoderStage(Stage):
    """The autoencoder of an experiment."""

    name, monitor = "autoencoder", "mse"

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.experiment
        loss, shape, channels = config.autoencoder.loss, config.data.shape, config.data.channels
        perceptual = loss.perceptual.build(shape)  # before all else: it may want what cannot be had
        self.training_data, self.validation_data = open_datasets(config.data, run.folder.data_index)
        torch.manual_seed(config.autoencoder.training.seed)
        self.network = config.autoencoder.network.build(shape, channels)
        self.adversary = None
        if loss.adversarial.weight:
            self.adversary = Adversary(loss.adversarial, loss.adversarial.discriminator.build(shape, channels))
            self.auxiliary = AuxiliaryNetwork(
                "discriminator",
                DiscriminatorObjective(self.adversary.discriminator),
                loss.adversarial.learning_rate,
                loss.adversarial.betas,
                loss.adversarial.start,
            )
        self.objective = self._objective = AutoencoderObjective(self.network, loss, perceptual, self.adversary)
        self.batch_size = config.codes.batch_size
        self.curves = {
            "reconstruction error": ["train/reconstruction", "validation/reconstruction"],
            "PSNR in dB": ["validation/psnr"],
            "codes in use": [f"{split}/usage_{name}" for name in config.levels for split in ("train", "validation")],
        }
        if len(loss.terms) > 1:
            self.curves["terms of the loss"] = [f"train/{term}" for term in loss.terms]

    @property
    def trained(self) -> nn.Module:
        return self.network

    def before_update(self, step: int) -> None:
        self._objective.quantized = step >= self.run.experiment.autoencoder.quantized_from
        if self.adversary:
            self.adversary.active = step >= self.adversary.config.start

    def auxiliary_batch(self) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] and their reconstructions, those of the latest batch."""
        assert self.adversary is not None
        assert self.adversary.latest is not None
        return self.adversary.latest

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.network.update_codebooks()
        for quantizer in self.network.quantizers:
            if isinstance(quantizer, GradientQuantizer) and quantizer.restarted is not None:
                forget(optimizer, quantizer.embedding, quantizer.restarted)

    def gathered(self) -> dict[str, float]:
        return self._objective.usage.take()

    def pending(self) -> dict[str, list[int]]:
        return self._objective.usage.pending()

    def resume(self, pending: dict[str, list[int]]) -> None:
        self._objective.usage.resume(pending)

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        return validate_autoencoder(self.network, self.validation_data, self.batch_size, accelerator)

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        validations = [entry for entry in entries if "validation/mse" in entry]
        last = {name.removeprefix("validation/"): value for name, value in validations[-1].items()}
        return codebook_warnings(last, self.run.experiment.levels)

    def preview(self, path: Path) -> None:
        """Held-out images, each over its reconstruction."""
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        originals = torch.stack([self.validation_data[index].image for index in range(count)])
        device = next(self.network.parameters()).device
        images = self.network.reconstruct(to_float(originals.to(device))).cpu()
        blocks, columns = interleave_rows(originals, to_uint8(images), columns=8)
        save_grid(path, blocks, columns)

    def save(self, path: Path) -> None:
        self.network.save(path, data=self.run.experiment.data.path, config=self.run.experiment.autoencoder.plain())


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Set the moments of a parameter's rows to zero where `rows` (K,) is true: they belong to vectors that are gone."""
    for moment in optimizer.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment.masked_fill_(rows[:, None], 0)


@torch.inference_mode()
def validate_autoencoder(
    network: Autoencoder, images: ImageDataset, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Error of the reconstructions, and use of the codebooks, over all of `images`, shared by the processes."""
    order = SequentialBatchSampler(len(images), batch_size, accelerator.process_index, accelerator.num_processes)
    errors = ReconstructionStatistics(accelerator.device)
    usages = [CodebookUsage(level.codebook_size, accelerator.device) for level in network.map_specs]
    for batch in load_batches(images, order, num_workers=0):
        originals = to_float(to_device(batch.image, accelerator.device))
        with accelerator.autocast():
            reconstruction = network(originals)
        errors.update(originals, reconstruction.images.float().clamp(-1, 1))
        for usage, level in zip(usages, reconstruction.levels, strict=True):
            usage.update(level.codes)
    errors.all_reduce()
    error = errors.compute()
    values = {"mse": error.mse, "psnr": error.psnr, "ssim": error.ssim}
    values["reconstruction"] = 4 * error.mse  # in the unit of the training term: images in [-1, 1], not [0, 1]
    for name, usage in zip(level_names(len(usages)), usages, strict=True):
        usage.all_reduce()
        values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
    return values


def train_autoencoder(run: Run) -> None:
    """Train the run's autoencoder, or go on where it was stopped; nothing to do where it is finished."""
    folder = run.folder.autoencoder
    if run.folder.autoencoder_weights.is_file():
        print_main(f"autoencoder: finished, {run.folder.autoencoder_weights}")
        return
    train(AutoencoderStage(run), run.experiment.autoencoder.training, folder, run.experiment.data.num_workers)


def main(arguments: list[str]) -> None:
    """The command `vqvae2 train-autoencoder`."""
    run, _ = open_run("train-autoencoder", arguments, "Train the autoencoder of an experiment (stage 1).")
    train_autoencoder(run)
