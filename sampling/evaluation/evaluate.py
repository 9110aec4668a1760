"""The command `vqvae2 evaluate`: the FID of a run's samples and its other metrics, with the protocol of measurement."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor
from tyro.conf import Positional

from sampling.evaluation import cas
from sampling.evaluation.evaluation_config import EvaluationConfig
from sampling.evaluation.features import (
    FeatureSummary,
    KeepOptions,
    is_statistics_file,
    summarize_features,
    summarize_features_cached,
)
from sampling.evaluation.fid import MIN_COMPARABLE_IMAGES
from sampling.evaluation.format_metrics import format_metrics
from sampling.evaluation.image_sets import ImageBatch, ImageFolder, open_image_set
from sampling.evaluation.metrics import Metrics, attempt, read_metrics
from sampling.output_folder import SampleManifest, find_other_network, manifest_path, read_manifest
from sampling.processes import processes
from sampling.run_config import RunConfig, parse_with_run_defaults
from sampling.run_data import load_run_autoencoder, open_run_datasets
from sampling.summary import Summary, read_summary
from vqvae2 import distributed, files
from vqvae2.command_line import Options
from vqvae2.data.images import ImageDataset, to_float, to_rgb, to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.metrics.inception import FeatureExtractor, WeightsUnavailableError, load_inception
from vqvae2.metrics.kid import kernel_inception_distance
from vqvae2.metrics.precision_recall import precision_recall
from vqvae2.models import Autoencoder
from vqvae2.run_folder import RunFolder, level_names

_MAX_FEATURES = 10_000
_INCEPTION_SCORE_SPLITS = 10


class EvaluateOptions(Options, EvaluationConfig):
    """Measure a run and its samples. Defaults come from the `evaluation` section of the run's config."""

    run: Positional[Path] = Field(description="run folder")
    samples: Path | None = Field(
        default=None, description="folder that `vqvae2 sample` wrote; RUN/samples if not given"
    )

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        options = parse_with_run_defaults(cls, "evaluation", arguments, prog)
        unused = [argument for argument in arguments if argument.startswith("--cas.")]
        if unused and not options.cas.enabled:
            raise UserError(f"{unused[0]}: has no effect without --cas.enabled. Add it.")
        return options

    @property
    def config(self) -> EvaluationConfig:
        """The settings that are also in the run's config."""
        return EvaluationConfig(**{name: getattr(self, name) for name in EvaluationConfig.model_fields})


def evaluate_run(run: Path, config: EvaluationConfig, samples: Path) -> dict[str, Any]:
    """Measure a run and its samples, and write the result to RUN/evaluation/metrics.json.

    The result holds the validation metrics of all training stages, and the distances from the reference of the images
    in `samples` and of reconstructions of held-out images. If the same evaluation is already stored, it is returned
    without measuring again. A metric that cannot be measured is `{"missing": reason}`. Without Inception weights only
    the training metrics are reported, and `fid` holds the reason.

    Raises:
        UserError: If the samples, the run or the reference are missing or damaged.
    """
    folder = RunFolder.existing(run)
    process = processes()
    score = None
    if config.cas.enabled and process.is_main_process:  # opened first, because it may fail
        score = cas.ClassificationAccuracyScore.open(folder, samples, config.cas)
    metrics = _stored_metrics(folder, config, samples) or _measure(folder, config, samples)
    if process.is_main_process:
        if score:
            device = process.device or "cpu"
            metrics["cas"] = attempt(lambda: score.measure(device))
        Metrics.from_dict(metrics, str(folder.metrics))  # so that what is written can be read back
        files.write_json(folder.metrics, metrics)
    return metrics


def _stored_metrics(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, Any] | None:
    """Return the metrics of an earlier, complete evaluation of the same artifacts, if there is one."""
    metrics = read_metrics(folder.metrics)
    if metrics and "protocol" in metrics and metrics["made_from"] == _made_from(folder, config, samples):
        return metrics
    return None


def _measure(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, Any]:
    made_from = _made_from(folder, config, samples)
    autoencoder = load_run_autoencoder(RunConfig.from_resolved_yaml(folder.config), folder)
    metrics = {
        "made_from": made_from,
        **_training_metrics(folder, autoencoder),
        **cas.previous_score(folder.metrics, made_from["samples"]),
    }
    try:
        weights = Path(config.inception_weights) if config.inception_weights else None
        extractor = load_inception(weights, device=torch.device(processes().device or "cpu"))
    except WeightsUnavailableError as error:
        return metrics | {"fid": {"missing": str(error)}}
    return metrics | _image_metrics(folder, config, samples, autoencoder.to(extractor.device), extractor)


def _made_from(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, str | None]:
    manifest = read_manifest(samples, SampleManifest)
    if manifest is None:
        raise UserError(f"{samples}: no samples found. Create them with `vqvae2 sample {folder.path}`.")
    if network := find_other_network(manifest, folder):
        raise UserError(
            f"{samples}: made with another {network} than the one in {folder.path}. Run `vqvae2 sample {folder.path}`, "
            "and give the folder that it prints with --samples."
        )
    reference = Path(config.reference)
    return {
        "samples": files.digest(manifest_path(samples)),
        "autoencoder": files.digest(folder.autoencoder_weights),
        "reference": config.reference,
        "reference_digest": open_image_set(reference).digest() if reference.is_dir() else None,
        "inception_weights": config.inception_weights,
    }


def _training_metrics(folder: RunFolder, autoencoder: Autoencoder) -> dict[str, Any]:
    """Return the metrics that the training stages computed on the whole validation split."""
    levels = level_names(len(autoencoder.map_specs))
    path = folder.autoencoder.summary
    summary = read_summary(path)
    likelihood = {}
    for level in levels:
        prior_path = folder.prior(level).summary
        likelihood[level] = _validation(read_summary(prior_path), prior_path, ("nll", "bits", "uniform", "unigram"))
    height, width = autoencoder.size
    bits: Any = {"missing": "needs the likelihood of every level"}
    if not any("missing" in values for values in likelihood.values()):
        sizes = zip(levels, autoencoder.map_specs, strict=True)
        bits = sum(likelihood[level]["bits"] * spec.num_codes for level, spec in sizes)
    return {
        "reconstruction": _validation(summary, path, ("mse", "psnr", "ssim")),
        "codes": {level: _validation(summary, path, ("usage", "perplexity"), f"_{level}") for level in levels},
        "likelihood": likelihood,
        # Both count the codes of all levels. A dimension is one channel of one pixel.
        "bits_per_image": bits,
        "bits_per_dimension": (
            bits if isinstance(bits, dict) else bits / (autoencoder.image_channels * height * width)
        ),
    }


def _validation(summary: Summary | None, path: Path, names: Sequence[str], suffix: str = "") -> dict[str, Any]:
    """Return values of the last validation by name, without the suffix, or why they are missing."""
    if summary is None:
        return {"missing": f"{path}: no such file"}
    lacking = [f"{name}{suffix}" for name in names if f"{name}{suffix}" not in summary.validation]
    if lacking:
        return {"missing": f"{path}: no {', '.join(lacking)} of the last validation"}
    return {name: summary.validation[f"{name}{suffix}"] for name in names}


@dataclass(frozen=True)
class _Reference:
    """Features of the images that samples are compared with."""

    name: str
    features: FeatureSummary
    formats: dict[str, int]  # number of images by file format; empty for precomputed statistics
    is_validation: bool = False

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": "validation" if self.is_validation else None,
            "count": self.features.statistics.count,
            "size": self.features.image_size,
            "formats": self.formats,
        }


def _image_metrics(
    folder: RunFolder, config: EvaluationConfig, samples: Path, autoencoder: Autoencoder, extractor: FeatureExtractor
) -> dict[str, Any]:
    """Return every metric that compares Inception features, with the protocol and its warnings."""
    manifest = read_manifest(samples, SampleManifest)
    assert manifest is not None, "checked by `_made_from`"
    _, held_out = open_run_datasets(RunConfig.from_resolved_yaml(folder.config).data, folder)
    generated = ImageFolder(samples / "images")
    features = summarize_features(
        generated.batches(config.batch_size), len(generated), extractor, _keep(len(generated)), "features of samples"
    )
    reference = _measure_reference(folder, config, held_out, extractor)
    originals = reference.features
    if not reference.is_validation:
        originals = _measure_held_out(held_out, config.batch_size, extractor)
    reconstructions = _measure_held_out(held_out, config.batch_size, extractor, autoencoder)
    counts = {"samples": len(generated), "reference": reference.features.statistics.count}
    return {
        "fid": attempt(lambda: _fid(features.statistics.distance(reference.features.statistics), counts)),
        "rfid": attempt(
            lambda: _fid(reconstructions.statistics.distance(originals.statistics), {"images": len(held_out)})
        ),
        **_feature_metrics(features, reference.features),
        "warnings": _warnings(features, generated.formats, reference),
        "protocol": {
            "samples": {
                "count": len(generated),
                "size": features.image_size,
                "formats": generated.formats,
                **manifest.model_dump(
                    mode="json", include={"seed", "sampling_params", "autoencoder", "priors"}, exclude_unset=True
                ),
            },
            "reference": reference.protocol(),
            "resize": "bicubic, antialiased" if reference.is_validation else "none",
            "crop": "center" if reference.is_validation else "none",
            "inception_weights": extractor.weights_digest,
            "standard_weights": extractor.is_standard,
            "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-fid", "scipy", "pillow")},
        },
    }


def _measure_reference(
    folder: RunFolder, config: EvaluationConfig, held_out: ImageDataset, extractor: FeatureExtractor
) -> _Reference:
    path, name = Path(config.reference), config.reference
    if name == "validation":
        features = _measure_held_out(held_out, config.batch_size, extractor)
        # The transform's output is measured directly, without a lossy file in between.
        return _Reference(name, features, {"png": len(held_out)}, is_validation=True)
    if is_statistics_file(path):
        return _Reference(name, FeatureSummary.load(path), {})
    images = open_image_set(path)
    keep, num_workers = _keep(len(images)), held_out.config.num_workers
    features = summarize_features_cached(images, extractor, folder.evaluation, keep, config.batch_size, num_workers)
    return _Reference(name, features, images.formats)


def _measure_held_out(
    images: ImageDataset, batch_size: int, extractor: FeatureExtractor, autoencoder: Autoencoder | None = None
) -> FeatureSummary:
    """Return the features of held-out images, or of their reconstructions if an autoencoder is given."""
    label = "features of reconstructions" if autoencoder else "features of held-out images"
    batches = _held_out_batches(images, batch_size, autoencoder)
    return summarize_features(batches, len(images), extractor, _keep(len(images)), label)


@torch.inference_mode()
def _held_out_batches(images: ImageDataset, batch_size: int, autoencoder: Autoencoder | None) -> Iterator[ImageBatch]:
    order = SequentialBatchSampler(len(images), batch_size, distributed.get_rank(), distributed.get_world_size())
    for indices, (pixels, _) in zip(order, load_batches(images, order, images.config.num_workers), strict=True):
        if autoencoder:
            device = next(autoencoder.parameters()).device
            pixels = to_uint8(autoencoder.reconstruct(to_float(pixels.to(device))))
        yield ImageBatch(torch.tensor(indices), to_rgb(pixels))


def _keep(count: int) -> KeepOptions:
    return KeepOptions(_MAX_FEATURES, min(_INCEPTION_SCORE_SPLITS, count))


def _fid(value: float, counts: dict[str, int | None]) -> dict[str, Any]:
    known = {name: count for name, count in counts.items() if count is not None}
    comparable = not known or min(known.values()) >= MIN_COMPARABLE_IMAGES
    sizes = ", ".join(f"{count} {name}" for name, count in known.items())
    text = f"{value:.2f} ({sizes}{'' if comparable else '; too few images for a comparable FID'})"
    return {"value": value, "text": text, "comparable": comparable}


def _feature_metrics(features: FeatureSummary, reference: FeatureSummary) -> dict[str, Any]:
    score = features.inception_score
    return {
        "inception_score": score._asdict() if score else {"missing": "needs the logits of the Inception network"},
        "kid": attempt(lambda: _kid(*_retained(features, reference))),
        "precision_recall": attempt(lambda: vars(precision_recall(*_retained(features, reference)))),
    }


def _kid(generated: Tensor, reference: Tensor) -> dict[str, float]:
    kid = kernel_inception_distance(generated, reference)
    return {"mean": kid.mean, "std": kid.std}


def _retained(features: FeatureSummary, reference: FeatureSummary) -> tuple[Tensor, Tensor]:
    if features.features is None or reference.features is None:
        raise UserError("the reference has statistics only, and no features of single images")
    return features.features, reference.features


def _warnings(features: FeatureSummary, formats: dict[str, int], reference: _Reference) -> list[str]:
    """Return the differences between samples and reference that bias the metrics."""
    warnings = []
    sizes = (features.image_size, reference.features.image_size)
    if all(sizes) and sizes[0] != sizes[1]:
        ours, theirs = ("×".join(map(str, size or ())) for size in sizes)
        warnings.append(
            f"samples are {ours} pixels and the reference is {theirs}; resize the reference to the size of the samples"
        )
    if reference.formats and set(reference.formats) != set(formats):
        warnings.append(
            f"samples are {'/'.join(formats)} and the reference is {'/'.join(reference.formats)}; lossy compression "
            "changes FID"
        )
    return warnings


def main(options: EvaluateOptions) -> None:
    """Run the command `vqvae2 evaluate`."""
    folder = RunFolder.existing(options.run)
    metrics = evaluate_run(folder.path, options.config, options.samples or folder.samples)
    if processes().is_main_process:
        print(f"{format_metrics(metrics)}\n{folder.metrics}")
