"""The command `vqvae2 evaluate`: FID of a run's samples and all else that was measured on it, with its protocol."""

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from sampling.evaluation import cas
from sampling.evaluation.features import FeatureSummary, KeepOptions, holds_statistics, summarize, summarize_cached
from sampling.evaluation.fid import COMPARABLE
from sampling.evaluation.image_sets import Batch, ImageFolder
from sampling.evaluation.image_sets import open_images as open_image_set
from sampling.processes import processes
from vqvae2 import distributed, files
from vqvae2.config import Config
from vqvae2.data.images import DataConfig, ImageDataset, open_datasets, to_float, to_rgb, to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.metrics.inception import FeatureExtractor, WeightsUnavailableError, load_inception
from vqvae2.metrics.kid import kernel_inception_distance
from vqvae2.metrics.precision_recall import precision_recall
from vqvae2.models import Autoencoder
from vqvae2.run_folder import RunFolder, level_names

_KEEP = KeepOptions(features=10_000, splits=10)
_NEIGHBOURS = 5  # that density and coverage look for; with no more images there is nothing to say


class EvaluationConfig(Config):
    """What samples are compared with."""

    reference: str = Field(
        default="validation", description="`validation`, the run's held-out images, or a folder of images, or an .npz"
    )
    inception_weights: str | None = Field(
        default=None, description="weights file of the Inception network; else downloaded"
    )
    batch_size: int = Field(default=50, ge=1)


def evaluate_run(run: Path, config: EvaluationConfig, samples: Path) -> dict[str, Any]:
    """Everything measured on a run, also written to evaluation/metrics.json: what training has validated, and how far
    the images in `samples`, and the reconstructions of held-out images, are from the reference.

    Without Inception weights the rest is reported, and `fid` says what is missing.
    """
    folder = RunFolder.existing(run)
    made_from = _made_from(folder, config, samples)
    if folder.metrics.is_file():
        metrics = files.read_json(folder.metrics)
        if metrics["made_from"] == made_from and metrics["fid"]["value"] is not None:
            return metrics
    metrics = {"made_from": made_from, **_from_training(folder), **cas.kept(folder.metrics, made_from["samples"])}
    process = processes()
    try:
        weights = Path(config.inception_weights) if config.inception_weights else None
        extractor = load_inception(weights, device=torch.device(process.device or "cpu"))
    except WeightsUnavailableError as error:
        metrics["fid"] = {"value": None, "text": f"not measured: {error}"}
    else:
        metrics |= _from_images(folder, config, samples, extractor)
    if process.is_main_process:
        files.write_json(folder.metrics, metrics)
    return metrics


def _made_from(folder: RunFolder, config: EvaluationConfig, samples: Path) -> dict[str, str | None]:
    if not (samples / "manifest.json").is_file():
        raise UserError(f"{samples}: no samples; make them with `vqvae2 sample {folder.path}`")
    reference = Path(config.reference)
    return {
        "samples": files.digest(samples / "manifest.json"),
        "autoencoder": files.digest(folder.autoencoder_weights),
        "reference": config.reference,
        "reference_digest": open_image_set(reference).digest() if reference.is_dir() else None,
        "inception_weights": config.inception_weights,
    }


def _from_training(folder: RunFolder) -> dict[str, Any]:
    """What the stages measured on the whole validation split."""
    autoencoder = Autoencoder.load(folder.autoencoder_weights)
    levels = level_names(len(autoencoder.map_specs))
    likelihood = {level: files.read_json(folder.prior(level) / "summary.json")["validation"] for level in levels}
    bits = sum(
        likelihood[level]["bits"] * spec.num_codes for level, spec in zip(levels, autoencoder.map_specs, strict=True)
    )
    height, width = autoencoder.size
    found = files.read_json(folder.autoencoder / "summary.json")["validation"]
    return {
        "reconstruction": {name: found[name] for name in ("mse", "psnr", "ssim")},
        "codes": {level: {name: found[f"{name}_{level}"] for name in ("usage", "perplexity")} for level in levels},
        "likelihood": likelihood,
        # Of the codes of all levels; a dimension is one channel of one pixel.
        "bits_per_image": bits,
        "bits_per_dimension": bits / (autoencoder.image_channels * height * width),
    }


def _from_images(
    folder: RunFolder, config: EvaluationConfig, samples: Path, extractor: FeatureExtractor
) -> dict[str, Any]:
    data = DataConfig.load(folder.config, "data")
    _, held_out = open_datasets(data, folder.data_index)
    batch = config.batch_size
    generated = ImageFolder(samples / "images")
    ours = summarize(generated.batches(batch), len(generated), extractor, _keep(len(generated)), "features of samples")
    originals: FeatureSummary | None = None
    if config.reference == "validation":
        reference = originals = _held_out(held_out, batch, extractor)
        formats = {"png": len(held_out)}  # pixels as they are after the transform, never compressed again
    elif holds_statistics(Path(config.reference)):
        reference, formats = FeatureSummary.load(Path(config.reference)), {}
    else:
        images = open_image_set(Path(config.reference))
        formats = images.formats
        reference = summarize_cached(images, extractor, folder.evaluation, _keep(len(images)), batch, data.num_workers)
    originals = originals or _held_out(held_out, batch, extractor)
    autoencoder = Autoencoder.load(folder.autoencoder_weights, extractor.device)
    reconstructions = _held_out(held_out, batch, extractor, autoencoder)
    counts = {"samples": len(generated), "reference": reference.statistics.count}
    manifest = files.read_json(samples / "manifest.json")
    return {
        "fid": _fid(ours.statistics.distance(reference.statistics), counts),
        "rfid": _fid(reconstructions.statistics.distance(originals.statistics), {"images": len(held_out)}),
        **_from_features(ours, reference),
        "warnings": _warnings(ours, reference, generated.formats, formats),
        "protocol": {
            "samples": {
                "count": len(generated),
                "size": ours.size,
                "formats": generated.formats,
                **{key: manifest[key] for key in ("seed", "choice", "autoencoder", "priors")},
            },
            "reference": {
                "name": config.reference,
                "split": "validation" if reference is originals else None,
                "count": reference.statistics.count,
                "size": reference.size,
                "formats": formats,
            },
            "resize": "bicubic, antialiased" if reference is originals else "none",
            "crop": "center" if reference is originals else "none",
            "inception_weights": extractor.weights_digest,
            "standard_weights": extractor.is_standard,
            "versions": {name: version(name) for name in ("torch", "torchvision", "pytorch-fid", "scipy", "pillow")},
        },
    }


def _warnings(
    ours: FeatureSummary, reference: FeatureSummary, our_formats: dict[str, int], formats: dict[str, int]
) -> list[str]:
    """Settings that differ between the two sides, and so move the numbers."""
    found = []
    if ours.size and reference.size and ours.size != reference.size:
        sizes = [f"{height}×{width}" for height, width in (ours.size, reference.size)]
        found.append(f"samples are {sizes[0]} and the reference is {sizes[1]} pixels: resize the reference alike")
    if formats and set(formats) != set(our_formats):
        found.append(
            f"samples are {'/'.join(our_formats)} and the reference is {'/'.join(formats)}: lossy compression moves FID"
        )
    return found


def _from_features(ours: FeatureSummary, reference: FeatureSummary) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if ours.score:
        values["inception_score"] = ours.score._asdict()
    if ours.features is not None and reference.features is not None:
        kid = kernel_inception_distance(ours.features, reference.features)
        values["kid"] = {"mean": kid.mean, "std": kid.std}
        if min(len(ours.features), len(reference.features)) > _NEIGHBOURS:
            values["manifold"] = vars(precision_recall(ours.features, reference.features))
    return values


def _keep(count: int) -> KeepOptions:
    return KeepOptions(_KEEP.features, min(_KEEP.splits, count))


def _fid(value: float, counts: dict[str, int | None]) -> dict[str, Any]:
    known = [count for count in counts.values() if count is not None]
    few = bool(known) and min(known) < COMPARABLE
    shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count is not None)
    text = f"{value:.2f} ({shown}{'; too few images for a comparable FID' if few else ''})"
    return {"value": value, "text": text, "comparable": not few}


def _held_out(
    images: ImageDataset, batch_size: int, extractor: FeatureExtractor, autoencoder: Autoencoder | None = None
) -> FeatureSummary:
    """Features of held-out images, or of their reconstructions."""
    label = "features of reconstructions" if autoencoder else "features of held-out images"
    batches = _batches(images, batch_size, autoencoder)
    return summarize(batches, len(images), extractor, _keep(len(images)), label)


@torch.inference_mode()
def _batches(images: ImageDataset, batch_size: int, autoencoder: Autoencoder | None) -> Iterator[Batch]:
    order = SequentialBatchSampler(len(images), batch_size, distributed.get_rank(), distributed.get_world_size())
    for indices, (pixels, _) in zip(order, load_batches(images, order, images.config.num_workers), strict=True):
        if autoencoder:
            device = next(autoencoder.parameters()).device
            pixels = to_uint8(autoencoder.reconstruct(to_float(pixels.to(device))))
        yield Batch(torch.tensor(indices), to_rgb(pixels))


def main(arguments: list[str]) -> None:
    """The command `vqvae2 evaluate`."""
    parser = argparse.ArgumentParser(prog="vqvae2 evaluate", description="Measure a run and its samples.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--samples", type=Path, help="folder that `vqvae2 sample` wrote; RUN/samples by default")
    parser.add_argument("--reference", help="`validation`, a folder of images, or an .npz with mu and sigma")
    parser.add_argument("--inception-weights", help="weights file of the Inception network")
    parser.add_argument("--batch-size", type=int, help="images in one pass of the Inception network")
    cas.add_options(parser)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    cas_config = cas.take_options(given)
    folder = RunFolder.existing(given.pop("run"))
    samples = given.pop("samples", folder.samples)
    config = EvaluationConfig.load(folder.config, "evaluation")
    config = EvaluationConfig.parse(config.plain() | given, "vqvae2 evaluate")
    experiment = cas.Experiment.open(folder, samples, cas_config) if cas_config else None
    metrics = evaluate_run(folder.path, config, samples)
    if processes().is_main_process:
        if experiment:
            metrics["cas"] = experiment.measure(processes().device or "cpu")
            files.write_json(folder.metrics, metrics)
        print(f"{describe(metrics)}\n{folder.metrics}", file=sys.stdout)


def describe(metrics: dict[str, Any]) -> str:
    """The metrics as a table, a line each."""
    found = metrics["reconstruction"]
    lines = [f"reconstruction   PSNR {found['psnr']:.2f} dB   SSIM {found['ssim']:.3f}"]
    for level, codes in metrics["codes"].items():
        lines.append(f"codes {level:<10} {codes['usage']:.0%} in use, perplexity {codes['perplexity']:.1f}")
    for level, found in metrics["likelihood"].items():
        lines.append(
            f"prior {level:<10} NLL {found['nll']:.3f} nats per code; uniform {found['uniform']:.3f}, "
            f"unigram {found['unigram']:.3f} ({1 - found['nll'] / found['unigram']:.0%} below)"
        )
    lines.append(
        f"codes of an image {metrics['bits_per_image']:,.0f} bits, "
        f"{metrics['bits_per_dimension']:.4f} bits per dimension"
    )
    distances = [f"FID              {metrics['fid']['text']}"]
    if "kid" in metrics:
        kid = f"KID              {metrics['kid']['mean']:.5f} ± {metrics['kid']['std']:.5f}"
        distances.insert(1 if metrics["fid"]["comparable"] else 0, kid)  # unbiased at any number of images
    if "rfid" in metrics:
        distances.append(f"FID of reconstr. {metrics['rfid']['text']}")
    lines += distances
    if "inception_score" in metrics:
        score = metrics["inception_score"]
        lines.append(f"Inception score  {score['mean']:.2f} ± {score['std']:.2f}")
    if "manifold" in metrics:
        lines.append("                 " + ", ".join(f"{k} {v:.3f}" for k, v in metrics["manifold"].items()))
    lines += cas.describe(metrics["cas"]) if "cas" in metrics else []
    if "protocol" in metrics:
        lines.append(_describe_protocol(metrics["protocol"]))
    lines += [f"warning          {warning}" for warning in metrics.get("warnings", [])]
    return "\n".join(lines)


def _describe_protocol(protocol: dict[str, Any]) -> str:
    ours, reference = protocol["samples"], protocol["reference"]
    size = "×".join(map(str, ours["size"] or ()))
    weights = "standard" if protocol["standard_weights"] else "NOT the standard"
    return (
        f"protocol         {ours['count']} samples of {size} pixels, seed {ours['seed']}, against "
        f"{reference['count'] or 'unknown'} of {reference['name']}; resize {protocol['resize']}, "
        f"crop {protocol['crop']}; "
        f"{weights} Inception weights {protocol['inception_weights'][:8]}"
    )
