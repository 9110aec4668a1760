"""Stage 1: train the autoencoder on images."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.experiment import Run, open_run, say
from train.loop import Stage, to_device, train
from vqvae2.data.batches import InOrder, load
from vqvae2.data.images import Images, Item, open_images, to_bytes, to_float
from vqvae2.metrics.codebook import CodeUsage
from vqvae2.metrics.reconstruction import ReconstructionStatistics
from vqvae2.models import Autoencoder
from vqvae2.pictures import save_grid, side_by_side
from vqvae2.run_folder import level_names

_PREVIEW_IMAGES = 16


class AutoencoderObjective(nn.Module):
    """Reconstruction error plus what the quantizers add (van den Oord et al. 2017, eq. 3)."""

    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network
        self.names = level_names(len(network.maps))

    def forward(self, batch: Item) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms for uint8 images (B, C, H, W)."""
        images = to_float(batch.image)
        reconstruction = self.network(images)
        terms = {"reconstruction": (reconstruction.images.float() - images).square().mean()}
        loss = terms["reconstruction"]
        for name, level in zip(self.names, reconstruction.levels, strict=True):
            loss = loss + level.loss
            terms |= {f"{term}_{name}": value for term, value in level.terms.items()}
        return loss, terms


class AutoencoderStage(Stage):
    """The autoencoder of an experiment."""

    name = "autoencoder"

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.experiment
        self.training_data, self.validation_data = open_images(config.data)
        torch.manual_seed(config.autoencoder.training.seed)
        self.network = config.autoencoder.network.build(config.data.shape, config.data.channels)
        self.objective = AutoencoderObjective(self.network)
        self.batch_size = config.codes.batch_size
        self.curves = {
            "reconstruction error": ["train/reconstruction", "validation/reconstruction"],
            "PSNR in dB": ["validation/psnr"],
            "codes in use": [f"validation/usage_{name}" for name in config.levels],
        }

    @property
    def trained(self) -> nn.Module:
        return self.network

    def after_update(self) -> None:
        self.network.update_codebooks()

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        return validate_autoencoder(self.network, self.validation_data, self.batch_size, accelerator)

    def preview(self, path: Path) -> None:
        """Held-out images, each over its reconstruction."""
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        originals = torch.stack([self.validation_data[index].image for index in range(count)])
        device = next(self.network.parameters()).device
        images = self.network.reconstruct(to_float(originals.to(device))).cpu()
        blocks, columns = side_by_side(originals, to_bytes(images), columns=8)
        save_grid(path, blocks, columns)

    def save(self, path: Path) -> None:
        self.network.save(path, data=self.run.experiment.data.path, config=self.run.experiment.autoencoder.plain())


@torch.inference_mode()
def validate_autoencoder(
    network: Autoencoder, images: Images, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Error of the reconstructions, and use of the codebooks, over all of `images`, shared by the processes."""
    order = InOrder(len(images), batch_size, accelerator.process_index, accelerator.num_processes)
    errors = ReconstructionStatistics(accelerator.device)
    usages = [CodeUsage(level.codes, accelerator.device) for level in network.maps]
    for batch in load(images, order, workers=0):
        originals = to_float(to_device(batch.image, accelerator.device))
        with accelerator.autocast():
            reconstruction = network(originals)
        errors.update(originals, reconstruction.images.float().clamp(-1, 1))
        for usage, level in zip(usages, reconstruction.levels, strict=True):
            usage.update(level.codes)
    errors.reduce()
    error = errors.result()
    values = {"mse": error.mse, "psnr": error.psnr, "ssim": error.ssim}
    values["reconstruction"] = 4 * error.mse  # in the unit of the training term: images in [-1, 1], not [0, 1]
    for name, usage in zip(level_names(len(usages)), usages, strict=True):
        usage.reduce()
        values |= {f"usage_{name}": usage.usage, f"perplexity_{name}": usage.perplexity}
    return values


def train_autoencoder(run: Run) -> None:
    """Train the run's autoencoder, or go on where it was stopped; nothing to do where it is finished."""
    folder = run.folder.autoencoder
    if run.folder.autoencoder_weights.is_file():
        say(f"autoencoder: finished, {run.folder.autoencoder_weights}")
        return
    train(AutoencoderStage(run), run.experiment.autoencoder.training, folder, run.experiment.data.workers)


def main(arguments: list[str]) -> None:
    """The command `vqvae2 train-autoencoder`."""
    run, _ = open_run("train-autoencoder", arguments, "Train the autoencoder of an experiment (stage 1).")
    train_autoencoder(run)
