"""The command `vqvae2 evaluate`: the FID of a run's samples and its other metrics, with the protocol of measurement."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from tyro.conf import Positional

from sampling.evaluation import cas
from sampling.evaluation.comparison import ComparedImages, Comparison, compare
from sampling.evaluation.evaluation_config import EvaluationConfig
from sampling.evaluation.features import is_statistics_file
from sampling.evaluation.format_metrics import format_metrics
from sampling.evaluation.image_sets import ImageFolder, open_image_set
from sampling.evaluation.metrics import Metrics, attempt, read_metrics
from sampling.output_folder import SampleManifest, current_samples, find_other_network, manifest_path, read_manifest
from sampling.processes import processes
from sampling.run_config import RunConfig, parse_with_run_defaults
from sampling.run_data import load_run_autoencoder, open_run_datasets
from sampling.summary import Summary, read_summary
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.errors import UserError
from vqvae2.metrics.feature_extractor import FeatureExtractor, WeightsUnavailableError
from vqvae2.metrics.inception import InceptionFeatures
from vqvae2.metrics.pretrained_features import INCEPTION, load_extractor
from vqvae2.models import Autoencoder
from vqvae2.run_folder import RunFolder, level_names

_IMAGES = ("samples", "autoencoder", "reference", "reference_digest")  # what the compared images depend on
_INCEPTION_METRICS = ("fid", "rfid", "inception_score", "kid", "precision_recall")


class EvaluateOptions(Options, EvaluationConfig):
    """Measure a run and its samples. Defaults come from the `evaluation` section of the run's config."""

    run: Positional[Path] = Field(description="run folder")
    samples: Path | None = Field(
        default=None,
        description="folder that `vqvae2 sample` wrote; RUN/samples if not given, or the newest samples-2, … if the "
        "networks have changed since",
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
    without measuring again; what an earlier evaluation measured on the same images in the features of other networks is
    kept. A metric that cannot be measured is `{"missing": reason}`. Without Inception weights,
    `fid` holds the reason.

    Raises:
        UserError: If the samples, the run or the reference are missing or damaged, or no network is available and
            there are earlier measurements.
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
    if not (metrics and "protocol" in metrics and metrics["made_from"] == _made_from(folder, config, samples)):
        return None
    measured = {INCEPTION: metrics["fid"]} | metrics.get("features", {})
    missing = tuple(each for each in config.features if "missing" in measured.get(each.partition("=")[0], {}))
    found, _ = _load_extractors(config.model_copy(update={"features": missing}))
    return None if found else metrics  # the weights of a network may have been unavailable then


def _measure(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, Any]:
    made_from = _made_from(folder, config, samples)
    autoencoder = load_run_autoencoder(RunConfig.from_resolved_yaml(folder.config), folder)
    earlier = _previous_features(folder.metrics, made_from)
    extractors, missing = _load_extractors(config)
    if earlier and not extractors and not config.cas.enabled:
        reason = next(iter(missing.values()))["missing"]
        raise UserError(f"{reason} {folder.metrics} is unchanged.")
    metrics = {
        "made_from": made_from,
        **_training_metrics(folder, autoencoder),
        **cas.previous_score(folder.metrics, made_from["samples"]),
        "fid": missing.get(INCEPTION, {"missing": "inception is not among the networks of --features"}),
        **earlier,
    }
    features = {name: reason for name, reason in missing.items() if name != INCEPTION} | metrics.pop("features", {})
    if extractors:
        images = _open_images(folder, config, samples, autoencoder)
        for extractor in extractors:
            comparison = compare(images, extractor)
            if isinstance(extractor, InceptionFeatures):
                metrics |= _inception_metrics(comparison)
            else:
                features[extractor.name] = _feature_metrics(comparison, extractor)
            metrics |= {
                "warnings": comparison.warnings(),
                "protocol": metrics.get("protocol", {}) | _protocol(comparison, extractor, samples),
            }
    return metrics | ({"features": features} if features else {})


def _previous_features(path: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier evaluation of the same images measured in the features of any network, else `{}`."""
    previous = read_metrics(path) or {"made_from": {}}
    if any(previous["made_from"].get(name) != made_from[name] for name in _IMAGES):
        return {}
    features = {name: each for name, each in previous.get("features", {}).items() if "missing" not in each}
    names = _INCEPTION_METRICS if "rfid" in previous else ()  # set if Inception was available
    found = {name: previous[name] for name in names} | ({"features": features} if features else {})
    return found | ({name: previous[name] for name in ("warnings", "protocol")} if found else {})


def _load_extractors(config: EvaluationConfig) -> tuple[list[FeatureExtractor], dict[str, dict[str, str]]]:
    """Load the networks whose features are compared. Returns them, and by name why others are missing."""
    device, extractors, missing = processes().device or "cpu", [], {}
    only_inception = is_statistics_file(Path(config.reference))
    for network in config.features:
        name = network.partition("=")[0]
        if only_inception and name != INCEPTION:
            missing[name] = {
                "missing": f"{config.reference}: statistics of Inception features. Use a folder of images."
            }
            continue
        try:
            extractors.append(load_extractor(network, config.inception_path, device))
        except WeightsUnavailableError as error:
            missing[name] = {"missing": str(error)}
    return extractors, missing


def _open_images(
    folder: RunFolder, config: EvaluationConfig, samples: Path, autoencoder: Autoencoder
) -> ComparedImages:
    _, held_out = open_run_datasets(RunConfig.from_resolved_yaml(folder.config).data, folder)
    return ComparedImages(
        samples=ImageFolder(samples / "images"),
        reference=config.reference,
        held_out=held_out,
        autoencoder=autoencoder.to(processes().device or "cpu"),
        batch_size=config.batch_size,
        cache=folder.evaluation,
    )


def _made_from(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, Any]:
    manifest = read_manifest(samples, SampleManifest)
    if manifest is None:
        raise UserError(f"{samples}: no samples found. Create them with `vqvae2 sample {folder.path}`.")
    if network := find_other_network(manifest, folder):
        raise UserError(
            f"{samples}: made with another {network} than the one in {folder.path}. Run `vqvae2 sample {folder.path}`, "
            "then this command without --samples."
        )
    reference = Path(config.reference)
    return {
        "samples": files.digest(manifest_path(samples)),
        "autoencoder": files.digest(folder.autoencoder_weights),
        "reference": config.reference,
        "reference_digest": _reference_digest(reference),
        "inception_weights": config.inception_weights,
        "weights": {str(path): files.digest(path) if path.is_file() else None for path in config.weights_files},
        "features": list(config.features),
    }


def _reference_digest(reference: Path) -> str | None:
    """Return a digest of reference images or statistics, None for the run's held-out images."""
    if str(reference) == "validation":
        return None
    return files.digest(reference) if is_statistics_file(reference) else open_image_set(reference).digest()


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


def _inception_metrics(comparison: Comparison) -> dict[str, Any]:
    """Return the metrics in Inception features, under the names that are usual for them."""
    return {
        "fid": comparison.distance(),
        "rfid": comparison.reconstruction_distance(),
        "inception_score": comparison.inception_score(),
        "kid": comparison.kernel_distance(),
        "precision_recall": comparison.precision_recall(),
    }


def _feature_metrics(comparison: Comparison, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return the metrics in the features of another network."""
    return {
        "fd": comparison.distance(),
        "rfd": comparison.reconstruction_distance(),
        "kd": comparison.kernel_distance(),
        "precision_recall": comparison.precision_recall(),
        "weights": extractor.weights_digest,
        "standard_weights": extractor.is_standard,
    }


def _protocol(comparison: Comparison, extractor: FeatureExtractor, samples: Path) -> dict[str, Any]:
    """Return how the images were compared."""
    manifest = read_manifest(samples, SampleManifest)
    assert manifest is not None, "checked by `_made_from`"
    reference = comparison.reference
    weights: dict[str, Any] = {}
    if isinstance(extractor, InceptionFeatures):
        weights = {"inception_weights": extractor.weights_digest, "standard_weights": extractor.is_standard}
    return {
        "samples": {
            "count": comparison.samples.statistics.count,
            "size": comparison.samples.image_size,
            "formats": comparison.formats,
            **manifest.model_dump(
                mode="json", include={"seed", "sampling_params", "autoencoder", "priors"}, exclude_unset=True
            ),
        },
        "reference": reference.protocol(),
        "resize": "bicubic, antialiased" if reference.is_validation else "none",
        "crop": "center" if reference.is_validation else "none",
        **weights,
        "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-fid", "scipy", "pillow")},
    }


def main(options: EvaluateOptions) -> None:
    """Run the command `vqvae2 evaluate`."""
    folder = RunFolder.existing(options.run)
    metrics = evaluate_run(folder.path, options.config, options.samples or current_samples(folder))
    if processes().is_main_process:
        print(f"{format_metrics(metrics)}\n{folder.metrics}")
