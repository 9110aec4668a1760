"""The command `vqvae2 likelihoods`: train all models, measure them, and write the table and its plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from experiments.likelihoods.likelihood_run import KINDS, BoundsConfig, CapacityConfig, LikelihoodOptions, LikelihoodRun
from experiments.likelihoods.stage import LikelihoodStage, bits_per_dim
from experiments.likelihoods.vae import VAE
from experiments.likelihoods.vimco import VIMCO
from experiments.likelihoods.vqvae import VQVAE
from sampling.processes import processes
from train.accelerator import make_accelerator
from train.loop import train
from train.run import is_finished
from vqvae2 import checkpoint, files
from vqvae2.config import Config, Measured
from vqvae2.models.multi_sample_bounds import multi_sample_bound
from vqvae2.pictures import make_figure, save_figure
from vqvae2.run_folder import StageFolder

_FIX = "Delete it and run the same command again."


class Measurement(Config):
    """Bounds of a model in bits per dimension of held-out images."""

    bound: Measured  # the bound that the model is trained with
    multi_sample: Measured  # the bound with `evaluation.samples` samples


class StoredMeasurement(Config):
    """Contents of evaluation.json in the folder of a model."""

    weights: str  # digest
    evaluation: BoundsConfig
    bits_per_dim: Measurement


def measure(run: LikelihoodRun, kind: str, capacity: CapacityConfig, folder: StageFolder) -> Measurement:
    """Return the bounds of a trained model. They are measured once per weights and settings."""
    path, weights, evaluation = folder.path / "evaluation.json", files.digest(folder.weights), run.config.evaluation
    if path.is_file():
        stored = StoredMeasurement.from_json(path, _FIX)
        if (stored.weights, stored.evaluation) == (weights, evaluation):
            return stored.bits_per_dim
    device, data = make_accelerator().device, run.images[1]
    network = checkpoint.load_module(folder.weights, kind, lambda: run.build(kind, capacity)).to(device)

    def multi_sample(images: Tensor) -> Tensor:
        return multi_sample_bound(network.log_weights(images, evaluation.samples))

    found = Measurement(
        bound=bits_per_dim(network.bound, data, evaluation, device),
        multi_sample=bits_per_dim(multi_sample, data, evaluation, device),
    )
    files.write_json(path, StoredMeasurement(weights=weights, evaluation=evaluation, bits_per_dim=found).to_dict())
    return found


def compare(run: LikelihoodRun) -> None:
    """Train and measure all models. Finished ones are skipped."""
    made_from = {"data": run.images[0].digest()}
    for folder, (kind, capacity) in run.stages().items():
        if not is_finished(folder.weights, made_from):
            stage = LikelihoodStage(run, kind, capacity)
            train(stage, run.config.training, folder.path, run.config.data.num_workers)
    if processes().is_main_process:
        measured = {folder: measure(run, *model, folder) for folder, model in run.stages().items()}
        write_results(
            run, [{kind: measured[run.stage(kind, each)] for kind in KINDS} for each in run.config.capacities]
        )
    processes().wait_for_everyone()


def write_results(run: LikelihoodRun, rows: Sequence[Mapping[str, Measurement]]) -> None:
    """Print the table of all capacities, and write it to results.json and likelihoods.png."""
    config, samples = run.config, run.config.evaluation.samples
    columns = {
        "VAE": [row[VAE.kind].bound for row in rows],
        f"VAE, {samples} samples": [row[VAE.kind].multi_sample for row in rows],
        "VQ-VAE": [row[VQVAE.kind].bound for row in rows],
        f"VIMCO, {config.vimco_samples} samples": [row[VIMCO.kind].bound for row in rows],
        f"VIMCO, {samples} samples": [row[VIMCO.kind].multi_sample for row in rows],
    }
    lines = [f"| latents | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for label, values in zip(config.labels, zip(*columns.values(), strict=True), strict=True):
        lines.append(f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |")
    contents = [
        {
            "latents": each.latents * config.positions,
            "codebook_size": each.quantizer.codebook_size,
            "bits_per_dim": {kind: measurement.to_dict() for kind, measurement in row.items()},
        }
        for each, row in zip(config.capacities, rows, strict=True)
    ]
    files.write_json(run.folder.path / "results.json", {"evaluation": config.evaluation.to_dict(), "rows": contents})
    _plot(run.folder.path / "likelihoods.png", config.labels, columns)
    print("\n".join(lines))


def _plot(path: Path, labels: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    figure = make_figure(1)
    axes = figure.subplots()
    for name, values in columns.items():
        axes.plot(labels, values, marker="o", markersize=4, linewidth=1.2, label=name)
    axes.set(xlabel="latents per image, and codebook size", ylabel="bits per dimension (upper bound)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)


def main(options: LikelihoodOptions) -> None:
    """Run the command `vqvae2 likelihoods`."""
    compare(LikelihoodRun.open(options))
