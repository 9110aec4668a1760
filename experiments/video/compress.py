"""The command `vqvae2 video three-codes`: train the model of three codes on cached codes, and reconstruct frames."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from experiments.video.three_codes import ThreeCodes
from experiments.video.video_run import VideoRun
from sampling.params import CodeSamplingParams
from sampling.processes import processes
from sampling.sample_level import Noise, sample_level
from train.loop import train
from train.quantized_stage import QuantizedObjective, QuantizedStage
from train.run import is_finished
from vqvae2 import checkpoint, files
from vqvae2.command_line import Options
from vqvae2.data.clips import find_clips
from vqvae2.data.code_store import CodeBatch, CodeStore
from vqvae2.data.images import to_float, to_uint8
from vqvae2.data.samplers import evenly_spaced
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.metrics.reconstruction import compare_images
from vqvae2.pictures import interleave_rows, save_grid

_BATCH, _PREVIEW_FRAMES = 64, 16
_GREEDY = CodeSamplingParams(temperature=0)


class ThreeCodesOptions(Options):
    """Train a VQ-VAE of the codes of a frame with three latents, or resume; then reconstruct held-out frames."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment with cached codes")
    count: int = Field(default=512, ge=1, le=10**6, description="held-out frames to reconstruct")
    codes: CodeSamplingParams = Field(default=_GREEDY, description="sampling of the first stage's codes")


class ThreeCodesObjective(QuantizedObjective):
    """Negative log-likelihood of the coarsest level's codes in nats per code, plus the loss of the quantizer."""

    def __init__(self, network: ThreeCodes) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: CodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its unweighted terms."""
        codes = batch.codes[-1].long()
        logits, quantization = self.network(codes, self.quantized)
        nll = F.cross_entropy(logits.float(), codes)
        return nll + quantization.loss, {"nll": nll} | quantization.loss_terms


class ThreeCodesStage(QuantizedStage[ThreeCodes, ThreeCodesObjective]):
    """Training of the model of three codes."""

    name, monitor = "three-codes", "nll"

    def __init__(self, run: VideoRun) -> None:
        self.run, self.config = run, run.config.three_codes
        self.training_data, self.validation_data = run.stores
        self.made_from = {"autoencoder": run.autoencoder.digest}
        torch.manual_seed(self.config.training.seed)
        self.network = ThreeCodes(self.config, self.training_data.header.levels[-1])
        self.quantizers, self.first_quantized_step = [self.network.quantizer], self.config.training.first_quantized_step
        self.objective = ThreeCodesObjective(self.network)
        others = ["validation/nll", "validation/nll_of_other"]
        self.curves = {"nats per code": ["train/nll", *others], "codes in use": ["validation/usage"]}

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of `measure_codes`. Every process measures all frames."""
        return measure_codes(self.network, self.validation_data)

    def preview(self, path: Path) -> None:
        """Write held-out frames, above their reconstructions by the first stage and from three codes."""
        save_grid(path, *interleave_rows(*reconstruct(self.run, self.network, _PREVIEW_FRAMES), columns=8))

    def save(self, path: Path) -> None:
        checkpoint.save_module(path, self.name, self.network, self.config, self.made_from)


@torch.inference_mode()
def measure_codes(network: ThreeCodes, store: CodeStore) -> dict[str, float]:
    """Return nats per code given the latents of the image and given those of another one, and the codebook's usage.

    A decoder that ignores the latents, a posterior collapse, has the same likelihood in both cases.
    """
    device = network.embedding.weight.device
    usage = CodebookUsage(network.quantizer.codebook_size, device)
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(2, dtype=torch.float64)
    for indices in order.split(_BATCH):
        codes = store.read(indices.tolist()).codes[-1].to(device)
        logits, quantization = network(codes)
        other = network.decoder(codes, (quantization.codes.roll(1, 0),))
        usage.update(quantization.codes)
        losses = [F.cross_entropy(each.float(), codes, reduction="sum") for each in (logits, other)]
        sums += torch.stack(losses).double().cpu()
    own, other = (sums / (len(store) * network.level.num_codes)).tolist()
    return {"nll": own, "nll_of_other": other, "usage": usage.usage, "perplexity": usage.perplexity}


@torch.inference_mode()
def reconstruct(
    run: VideoRun, network: ThreeCodes, count: int, params: CodeSamplingParams = _GREEDY
) -> list[UInt8[Tensor, "n c h w"]]:
    """Return held-out frames, their reconstructions by the first stage, and those from the latent codes."""
    store, device = run.stores[1], network.embedding.weight.device
    chosen = evenly_spaced(len(store), count)
    codes = store.read(chosen).codes
    latents = network.encode(codes[-1].to(device))
    sampled = sample_level(network.decoder, Noise(0, chosen, 0), params, (latents,)).cpu()
    originals = torch.stack([run.frames[1][index].image for index in chosen])
    decoded = run.autoencoder.decode(codes), run.autoencoder.decode((*codes[:-1], sampled), run.config.levels[-1:])
    return [originals, *map(to_uint8, decoded)]


def write_reconstructions(run: VideoRun, options: ThreeCodesOptions) -> dict[str, float]:
    """Write the picture of reconstructions and the metrics to the folder of the stage, and return the metrics."""
    folder, level, (frames, _) = run.three_codes, run.stores[1].header.levels[-1], run.frames
    network = checkpoint.load_module(
        folder.weights, ThreeCodesStage.name, lambda: ThreeCodes(run.config.three_codes, level)
    )
    originals, *others = reconstruct(run, network, options.count, options.codes)
    chosen = range(0, len(frames), max(1, len(frames) // options.count))
    mean = torch.stack([frames[index].image for index in chosen]).double().mean(0).round().to(torch.uint8)
    latents = network.config.latents * math.log2(network.quantizer.codebook_size)
    metrics = {"bits": latents, "bits_of_first_stage": level.num_codes * math.log2(level.codebook_size)}
    images_of = {"first_stage": others[0], "three_codes": others[1], "mean_frame": mean.expand_as(originals)}
    for name, images in images_of.items():
        metrics[f"psnr_{name}"] = compare_images(to_float(originals), to_float(images)).psnr
    metrics |= measure_codes(network, run.stores[1])
    files.write_json(folder.path / "metrics.json", metrics)
    shown = (images[list(evenly_spaced(len(images), _PREVIEW_FRAMES))] for images in (originals, *others))
    save_grid(folder.path / "reconstructions.png", *interleave_rows(*shown, columns=8))
    return metrics


def main(options: ThreeCodesOptions) -> None:
    """Run the command `vqvae2 video three-codes`."""
    run = VideoRun.existing(options.run)
    find_clips(run.stores[1])  # raises if frames are unreadable, whose images could not be matched with codes
    stage, folder = ThreeCodesStage(run), run.three_codes
    if not is_finished(folder.weights, stage.made_from):
        train(stage, stage.config.training, folder.path, run.config.data.num_workers, run.config.tracker)
    if processes().is_main_process:
        metrics = write_reconstructions(run, options)
        print("\n".join(f"{name.replace('_', ' '):<20} {value:.3f}" for name, value in metrics.items()))
        print(folder.path / "reconstructions.png")
