"""The command `vqvae2 tune-sampling`: find the temperature and top-p whose samples are closest to held-out images.

Low values make typical and similar images. With values of 1, images follow the distribution of the priors, including
its mistakes. The Fréchet distance increases with both.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from tqdm import tqdm
from tyro.conf import Positional

from sampling.evaluation.comparison import measure_held_out
from sampling.evaluation.features import summarize_features
from sampling.evaluation.image_sets import ImageBatch
from sampling.output_folder import next_free
from sampling.params import ClassLabels, FloatPerLevel, SamplingConfig, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.run_config import RunConfig
from sampling.run_data import open_run_datasets
from sampling.sample import common_batch_size, sample_images
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.config import Config, Measured
from vqvae2.data.images import to_rgb
from vqvae2.metrics.feature_extractor import FeatureExtractor
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.pretrained_features import NETWORKS_HELP, NetworkSetting, load_extractor
from vqvae2.run_folder import RunFolder

_BATCH_SIZE = 50  # images per pass of the network whose features are compared
_DEFAULTS = {name: SamplingParams.model_fields[name].default for name in ("temperature", "top_p")}
_FIX = "Delete it and run `vqvae2 tune-sampling` again."


class TuneSamplingOptions(Options):
    """Sample with each combination of temperature and top-p, and write the best to the run's config.

    The best has the lowest Fréchet distance from the held-out images. Results are kept in RUN/evaluation/tuning.json;
    the same command resumes, and measures further combinations. Results with another network, number of images or other
    settings are kept in tuning-2.json, tuning-3.json, ….
    """

    run: Positional[Path] = Field(description="run folder")
    features: NetworkSetting | None = Field(
        default=None, description=f"network: {NETWORKS_HELP}; the first of the run's `evaluation.features` if not given"
    )
    temperature: tuple[FloatPerLevel, ...] = Field(
        default=(0.8, 0.9, 1.0), min_length=1, description="temperatures, each one value or LEVEL=VALUE,..."
    )
    top_p: tuple[FloatPerLevel, ...] = Field(
        default=(0.9, 0.95, 1.0), min_length=1, description="values of top-p, each one value or LEVEL=VALUE,..."
    )
    count: int = Field(default=1000, ge=2, le=10**7, description="images per combination")


class Trial(Config):
    """The distance of the samples of one combination from the held-out images."""

    temperature: FloatPerLevel
    top_p: FloatPerLevel
    distance: Measured


class Tuning(Config):
    """Contents of tuning.json: trials with the same networks, images and settings."""

    autoencoder: str  # digest
    priors: tuple[str, ...]  # digests, finest level first
    network: str
    weights: str  # digest of the network's weights
    count: int
    seed: int
    classes: ClassLabels
    other_params: SamplingParams  # with the default temperature and top-p
    held_out: int  # number of held-out images
    trials: tuple[Trial, ...] = ()

    def extends(self, other: "Tuning") -> bool:
        """Return whether all fields but the trials are equal."""
        return self.model_copy(update={"trials": other.trials}) == other

    def best(self) -> Trial:
        """Return the trial with the lowest distance."""
        return min(self.trials, key=lambda trial: trial.distance)


def tune_sampling(run: Path, options: TuneSamplingOptions) -> Tuning:
    """Measure each combination of parameters that has not been measured yet. Returns all measurements.

    Raises:
        UserError: If the run has no priors, or the network's weights are not available.
    """
    folder = RunFolder.existing(run)
    if processes().is_main_process:
        files.lock_folder(folder.path)
    config = RunConfig.from_resolved_yaml(folder.config)
    device = torch.device(processes().device or "cpu")
    pipeline = VQVAE2Pipeline.from_pretrained(run, device)
    sampling = dict(config.sampling) | {"count": options.count}
    combinations = [
        SamplingConfig.from_dict(sampling | {"temperature": temperature, "top_p": top_p}, "tune-sampling")
        for temperature, top_p in itertools.product(options.temperature, options.top_p)
    ]
    for combination in combinations:
        pipeline.check_params(combination.params)
    extractor = load_extractor(
        options.features or config.evaluation.features[0], config.evaluation.inception_path, device
    )
    _, held_out = open_run_datasets(config.data, folder)
    new = Tuning(
        autoencoder=str(pipeline.autoencoder.digest),
        priors=tuple(str(prior.digest) for prior in pipeline.priors),
        network=extractor.name,
        weights=extractor.weights_digest,
        count=options.count,
        seed=config.sampling.seed,
        classes=config.sampling.classes,
        other_params=config.sampling.params.model_copy(update=_DEFAULTS),
        held_out=len(held_out),
    )
    path = next_free(folder.tuning, lambda path: _read(path, new).extends(new), folder.tuning.suffix)
    tuning = _read(path, new)
    measured = {(str(trial.temperature), str(trial.top_p)) for trial in tuning.trials}
    remaining = [each for each in combinations if (str(each.temperature), str(each.top_p)) not in measured]
    if not remaining:
        return tuning
    reference = measure_held_out(held_out, config.evaluation.batch_size, extractor).statistics
    for each in tqdm(remaining, "combinations", disable=not processes().is_main_process):
        distance = _distance(pipeline, each, extractor, reference)
        trial = Trial(temperature=each.temperature, top_p=each.top_p, distance=distance)
        tuning = tuning.model_copy(update={"trials": (*tuning.trials, trial)})
        if processes().is_main_process:
            files.write_json(path, tuning.to_dict())
    return tuning


def _read(path: Path, new: Tuning) -> Tuning:
    """Return the tuning in a file, or `new` if there is no file."""
    return Tuning.from_json(path, _FIX) if path.is_file() else new


def _distance(
    pipeline: VQVAE2Pipeline, config: SamplingConfig, extractor: FeatureExtractor, reference: GaussianStatistics
) -> float:
    """Return the Fréchet distance between samples and the statistics of held-out images."""
    batch_size = common_batch_size(pipeline, config)

    def batches() -> Iterator[ImageBatch]:
        samples = sample_images(pipeline, config, batch_size, range(config.count), show_progress=False)
        while batch := list(itertools.islice(samples, _BATCH_SIZE)):
            images = to_rgb(torch.stack([sample.image for sample in batch]))
            yield ImageBatch(torch.tensor([sample.number for sample in batch]), images)

    return summarize_features(batches(), config.count, extractor).statistics.distance(reference)


def main(options: TuneSamplingOptions) -> None:
    """Run the command `vqvae2 tune-sampling`."""
    tuning = tune_sampling(options.run, options)
    if not processes().is_main_process:
        return
    best = tuning.best()
    for trial in sorted(tuning.trials, key=lambda trial: trial.distance):
        print(f"FD {trial.distance:8.2f}   temperature {trial.temperature}, top-p {trial.top_p}")
    folder = RunFolder(options.run)
    config = RunConfig.from_resolved_yaml(folder.config)
    sampling = config.sampling.model_copy(update={"temperature": best.temperature, "top_p": best.top_p})
    files.write_text(folder.config, config.model_copy(update={"sampling": sampling}).to_yaml())
    settings = {name: value for name, value in sampling.to_dict().items() if name in _DEFAULTS}
    print(
        f"{tuning.network} features, {tuning.count} samples, {tuning.held_out} held-out images\n"
        f"The first combination is now the default of `vqvae2 sample {options.run}`, in {folder.config}.\n"
        f"Commands with your own config file write its values there again; to keep these, add to the file:\n"
        f"  sampling: {json.dumps(settings)}"
    )
