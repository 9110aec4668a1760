"""Stage 1: train the autoencoder on images."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from sampling.evaluation.training_checks import codebook_warnings
from sampling.processes import processes
from sampling.run_data import open_run_datasets
from train.accelerator import make_accelerator, shared_batches
from train.loop import AuxiliaryNetwork, train
from train.losses import (
    AdversarialLoss,
    CodebookUsageTracker,
    DiscriminatorObjective,
    PerceptualLoss,
    make_perceptual_loss,
)
from train.quantized_stage import QuantizedObjective, QuantizedStage
from train.run import Run, RunOptions, open_run, print_main
from vqvae2 import files
from vqvae2.data.images import ImageDataset, ImageSample, to_float, to_uint8
from vqvae2.distributed import all_reduce_sum
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.metrics.reconstruction import ReconstructionStatistics
from vqvae2.models import Autoencoder
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.run_folder import StageFolder, level_names
from vqvae2.training_config import AutoencoderLossConfig

_PREVIEW_IMAGES = 16


class TrainAutoencoderOptions(RunOptions):
    """Train the autoencoder of a config (stage 1), or resume its training."""


class AutoencoderObjective(QuantizedObjective):
    """Reconstruction loss plus the losses of the quantizers (van den Oord et al. 2017, eq. 3)."""

    def __init__(
        self,
        network: Autoencoder,
        loss: AutoencoderLossConfig | None = None,
        perceptual: PerceptualLoss | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        self.network, self.config = network, loss or AutoencoderLossConfig()
        self.perceptual, self.adversarial = perceptual, adversarial
        self.names = level_names(len(network.map_specs))
        self.usage = CodebookUsageTracker(
            {name: level.codebook_size for name, level in zip(self.names, network.map_specs, strict=True)}
        )
        self.decoder_only = False

    def forward(self, batch: ImageSample) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its unweighted terms for uint8 images (B, C, H, W)."""
        images = to_float(batch.image)
        output = self.network(images, self.quantized, self.decoder_only)
        reconstruction = output.images.float()
        difference = reconstruction - images
        loss = difference.abs().mean() if self.config.pixel == "l1" else difference.square().mean()
        terms = {self.config.pixel_term: loss}
        for name, level in zip(self.names, output.levels, strict=True):
            loss = loss + level.loss
            terms |= {f"{term}_{name}": value for term, value in level.loss_terms.items()}
        if self.perceptual and self.perceptual.active:
            terms["perceptual"] = self.perceptual(reconstruction, images)
            loss = loss + self.config.perceptual.weight * terms["perceptual"]
        if self.adversarial and self.adversarial.active:
            terms["adversarial"] = self.adversarial(images, reconstruction)
            loss = loss + self.config.adversarial.weight * terms["adversarial"]
        if self.usage and self.network.training and self.quantized:
            self.usage.update(output.levels)
        return loss, terms


class AutoencoderStage(QuantizedStage[Autoencoder, AutoencoderObjective]):
    """Training of the autoencoder of a run."""

    name, monitor = "autoencoder", "mse"

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config.autoencoder
        self.find_unused_parameters = self.config.training.decoder_steps > 0
        loss, shape, channels = self.config.loss, run.config.data.shape, run.config.data.channels
        perceptual = make_perceptual_loss(loss.perceptual, shape)  # first, because it may fail
        self.training_data, self.validation_data = open_run_datasets(run.config.data, run.folder)
        torch.manual_seed(self.config.training.seed)
        self.network = self.config.model.build(shape, channels)
        self.quantizers = self.network.quantizers
        self.pretrained = None
        if self.config.pretrained is not None:
            self.pretrained = Autoencoder.from_pretrained(self.config.pretrained)
            self.network.load_state_dict(self.pretrained.state_dict())
            self.made_from = {"pretrained": self.pretrained.digest}
        self.first_quantized_step = 0 if self.pretrained else self.config.training.first_quantized_step
        self.adversarial = None
        if loss.adversarial.weight:
            discriminator = loss.adversarial.discriminator.build(shape, channels)
            self.adversarial = AdversarialLoss(loss.adversarial, discriminator)
            self.auxiliary = AuxiliaryNetwork(
                "discriminator",
                DiscriminatorObjective(discriminator),
                loss.adversarial.learning_rate,
                loss.adversarial.betas,
                loss.adversarial.start,
            )
        self.objective = AutoencoderObjective(self.network, loss, perceptual, self.adversarial)
        *coarse_levels, _ = self.config.model.progressive_levels
        self.curves = {
            "reconstruction error": ["train/reconstruction", "validation/reconstruction"],
            "PSNR in dB": ["validation/psnr", *(f"validation/psnr_{levels[0]}" for levels in coarse_levels)],
            "codes in use": [
                f"{split}/usage_{name}" for name in run.config.levels for split in ("train", "validation")
            ],
        }
        if len(loss.terms) > 1:
            self.curves["terms of the loss"] = [f"train/{term}" for term in loss.terms]

    def before_update(self, step: int) -> None:
        super().before_update(step)
        first = self.first_quantized_step
        self.objective.decoder_only = step >= self.config.training.first_decoder_step
        if self.objective.decoder_only:
            self.network.quantizers.eval()  # the codebooks no longer change
        if step == first and processes().is_main_process and not self._is_initialized():  # may take a minute
            tqdm.write("autoencoder: initializing the codebooks with k-means", sys.stderr)
        if self.config.training.compile:  # k-means would split the graph in many places
            torch.compiler.set_stance("force_eager" if step == first else "default")
        if self.objective.perceptual:
            self.objective.perceptual.active = step >= self.config.loss.perceptual.start
        if self.adversarial:
            self.adversarial.active = step >= self.adversarial.config.start

    def _is_initialized(self) -> bool:
        """Return whether all codebooks are initialized. Waits for the device."""
        return all(getattr(quantizer, "initialized", True) for quantizer in self.network.quantizers)

    def auxiliary_batch(self) -> tuple[Tensor, Tensor]:
        """Return the images in [-1, 1] and the reconstructions of the last batch."""
        assert self.adversarial is not None
        assert self.adversarial.latest is not None
        return self.adversarial.latest

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        batch_size = self.run.config.extract_codes.batch_size
        return validate_autoencoder(self.network, self.validation_data, batch_size, accelerator)

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        validations = [entry for entry in entries if "validation/mse" in entry]
        last = {name.removeprefix("validation/"): value for entry in validations[-1:] for name, value in entry.items()}
        return codebook_warnings(last, self.run.config.levels)

    def preview(self, path: Path) -> None:
        """Write held-out images, each above its reconstruction.

        With level dropout, reconstructions from the coarsest level alone, from the two coarsest, … are between them.
        """
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        originals = torch.stack([self.validation_data[index].image for index in range(count)])
        device = next(self.network.parameters()).device
        codes = self.network.encode(to_float(originals.to(device)))
        rows = [to_uint8(self.network.decode(codes, levels)).cpu() for levels in self.config.model.progressive_levels]
        blocks, columns = interleave_rows(originals, *rows, columns=8)
        save_grid(path, blocks, columns)

    def save(self, path: Path) -> None:
        self.network.save(path, data=self.run.config.data.path, config=self.config.to_dict(), **self.made_from)


@torch.inference_mode()
def validate_autoencoder(
    network: Autoencoder, images: ImageDataset, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Return reconstruction errors and codebook usage over all of `images`, which the processes share.

    With level dropout, `psnr_LEVEL` is the PSNR of reconstructions from this level and the coarser ones only.
    `same_codes_LEVEL` is the share of codes that are those of the first image at the same position, except its own.
    """
    *coarse_levels, _ = network.config.progressive_levels
    errors = ReconstructionStatistics(accelerator.device)
    coarse_errors = {levels: ReconstructionStatistics(accelerator.device) for levels in coarse_levels}
    usages = [CodebookUsage(level.codebook_size, accelerator.device) for level in network.map_specs]
    with accelerator.autocast():
        first = network.encode(to_float(images[0].image[None].to(accelerator.device)))
    same_codes = torch.zeros(len(usages), dtype=torch.int64, device=accelerator.device)
    for batch in shared_batches(images, batch_size, accelerator):
        originals = to_float(batch.image)
        with accelerator.autocast():
            output = network(originals)
        errors.update(originals, output.images.float().clamp(-1, 1))
        for usage, level in zip(usages, output.levels, strict=True):
            usage.update(level.codes)
        matches = [(level.codes == codes).sum() for level, codes in zip(output.levels, first, strict=True)]
        same_codes += torch.stack(matches)
        for levels, coarse_error in coarse_errors.items():
            with accelerator.autocast():
                decoded = network.decode(tuple(level.codes for level in output.levels), levels)
            coarse_error.update(originals, decoded.float())
    errors.all_reduce()
    error = errors.compute()
    values = {"mse": error.mse, "psnr": error.psnr, "ssim": error.ssim}
    for levels, coarse_error in coarse_errors.items():
        coarse_error.all_reduce()
        values[f"psnr_{levels[0]}"] = coarse_error.compute().psnr
    values["reconstruction"] = 4 * error.mse  # comparable to the training term: images in [-1, 1] instead of [0, 1]
    counts = all_reduce_sum(same_codes).tolist()
    for name, usage, same in zip(level_names(len(usages)), usages, counts, strict=True):
        usage.all_reduce()
        values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
        if len(images) > 1:
            own = usage.total // len(images)
            values[f"same_codes_{name}"] = (same - own) / (usage.total - own)
    return values


def train_autoencoder(run: Run) -> None:
    """Train the autoencoder of a run, or resume its training. Do nothing if it is complete."""
    folder = run.folder.autoencoder
    if folder.weights.is_file():
        print_main(f"autoencoder: already complete, {folder.weights}")
        return
    stage = AutoencoderStage(run)
    if stage.config.training.steps:
        train(stage, stage.config.training, folder.path, run.config.data.num_workers, run.config.tracker)
    else:
        _copy_pretrained(stage, folder)


def _copy_pretrained(stage: AutoencoderStage, folder: StageFolder) -> None:
    """Validate the pretrained weights on the images of the run, and copy them to its folder."""
    assert stage.pretrained is not None
    print_main(f"autoencoder: using {stage.config.pretrained} without training")
    started = time.monotonic()
    accelerator = make_accelerator()
    stage.network.to(accelerator.device).eval()
    validation = stage.validate(accelerator)
    if accelerator.is_main_process:
        stage.preview(folder.preview(0))
        seconds = round(time.monotonic() - started, 1)
        files.write_json(folder.summary, {"steps": 0, "seconds": seconds, "validation": validation})
        # The same bytes as the original, unless it was made for images of another size.
        stage.network.save(folder.weights, **stage.pretrained.made_from)
    accelerator.wait_for_everyone()


def main(options: TrainAutoencoderOptions) -> None:
    """Run the command `vqvae2 train-autoencoder`."""
    train_autoencoder(open_run(options))
