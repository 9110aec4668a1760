"""The command `vqvae2 report`: show a run, finished or not, on one self-contained HTML page.

The page is rendered by page.html from the settings, metrics and images in the run folder. No weights are loaded and
nothing is measured, so the same run always gives the same page.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from tyro.conf import Positional

from sampling.output_folder import SampleManifest, find_other_network, manifest_path
from sampling.report.diagnosis import row_captions
from sampling.report.formatting import format_duration, format_sentence, format_value
from sampling.report.picture import Picture, load_picture
from sampling.report.run_status import RunStatus, read_run
from sampling.report.templates import make_environment
from vqvae2 import files
from vqvae2.code_maps import MapSpec
from vqvae2.command_line import Options
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder, StageFolder

_MISSING = "–"
_MAX_CLASSES = 24  # class names listed in the caption of the samples
_NOTES = {
    "kid": "lower is better; unbiased for any number of images",
    "inception_score": "higher is better; independent of the reference",
    "precision": "fraction of samples inside the reference manifold",
    "recall": "fraction of reference images inside the sample manifold",
    "density": "number of reference neighborhoods around a sample, relative to k; can exceed 1",
    "coverage": "fraction of reference images with a sample in their neighborhood",
}


class Preview(NamedTuple):
    """The latest preview of a training stage."""

    picture: Picture
    step: int | None  # None if there is no preview


class Metric(NamedTuple):
    """One row of the table of metrics, or one of the headline figures."""

    name: str
    value: str
    note: str = ""


class ReportOptions(Options):
    """Write one HTML page that shows a run, finished or not."""

    run: Positional[Path] = Field(description="run folder")
    samples: Path | None = Field(
        default=None,
        description="folder that `vqvae2 sample` wrote; RUN/samples if not given, or the newest samples-2, … if the "
        "networks have changed since",
    )


def write_report(run: Path, samples: Path | None = None) -> Path:
    """Write report.html to a run folder, and return its path.

    Args:
        run: The run folder. Its stages need not be finished.
        samples: A folder written by `vqvae2 sample`; see `current_samples` for the default.

    Raises:
        UserError: If `run` is not a run folder, a file in it is damaged, or there are no samples in `samples`.
    """
    folder = RunFolder.existing(run)
    if samples is not None and not manifest_path(samples).is_file():
        raise UserError(f"--samples {samples}: no manifest.json. Give a folder that `vqvae2 sample` wrote.")
    status = read_run(folder, samples)
    environment = make_environment()
    environment.filters |= {"sentence": format_sentence, "value": format_value}
    text = environment.get_template("page.html").render(
        run=status,
        source="built-in scenes" if status.data.path == "scenes" else Path(status.data.path).name,
        map_sizes=[_map_size(spec) for spec in status.maps.values()],
        highlights=list(_highlights(status)),
        reconstructions=_preview(status.folder.autoencoder, "held-out images and their reconstructions"),
        progressive_levels=[" + ".join(reversed(levels)) for levels in status.progressive_levels],
        samples=load_picture(status.samples / "grid.png", "sampled images (requires all priors)"),
        other_network=status.manifest and find_other_network(status.manifest, status.folder),
        classes=_classes(status.manifest),
        previews=_prior_previews(status),
        diagnosis=_diagnosis(status),
        curves=_curves(status),
        codebooks=_codebooks(status),
        likelihood=_likelihood(status),
        metrics=_metrics(status),
        timings=_timings(status),
        config=status.folder.config.read_text(encoding="utf-8"),
        provenance=_provenance(status),
    )
    path = status.folder.report
    # File names that are not valid UTF-8 contain lone surrogates, which cannot be encoded.
    files.write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def _map_size(spec: MapSpec) -> str:
    return f"{spec.height} × {spec.width}"


def _highlights(run: RunStatus) -> Iterator[Metric]:
    """Yield the headline figures; the note is the unit."""
    validation = run.stages["autoencoder"].metrics
    if "psnr" in validation:
        yield Metric("Reconstruction PSNR", f"{validation['psnr']:.2f}", "dB")
    if "ssim" in validation:
        yield Metric("Reconstruction SSIM", f"{validation['ssim']:.3f}")
    if (bits := _bits_per_image(run, "nll")) is not None:
        yield Metric("Code likelihood", f"{bits:,.0f}", "bits per image")
    measured = [row for row in _metric_rows(run.metrics) if row.value != _MISSING] if run.metrics else []
    if measured:
        yield measured[0]._replace(note="")


def _preview(folder: StageFolder, alt: str) -> Preview:
    path = folder.newest_preview()
    step = int(path.stem) if path and path.stem.isdecimal() else None
    return Preview(load_picture(path, alt), step)


def _prior_previews(run: RunStatus) -> dict[str, Preview]:
    """Return the preview of each prior by level, coarsest first."""
    return {
        level: _preview(run.folder.prior(level), f"held-out images, and the same images with sampled {level} codes")
        for level in reversed(run.maps)
    }


def _classes(manifest: SampleManifest | None) -> dict[str, Any]:
    """Return the sampled class names, the number of further ones, and whether the images cycle through them."""
    labels = (manifest.labels if manifest else None) or ()
    used = list(dict.fromkeys(labels))
    names = [manifest.class_names[label] for label in used] if manifest else []
    cycled = all(label == used[index % len(used)] for index, label in enumerate(labels))
    return {"names": names[:_MAX_CLASSES], "more": max(0, len(names) - _MAX_CLASSES), "cycled": cycled}


def _diagnosis(run: RunStatus) -> dict[str, Any] | None:
    if run.diagnosis is None:
        return None
    captions = row_captions(list(run.maps))
    path = run.folder.diagnosis / "diagnosis.png"
    return {
        "picture": load_picture(path, "held-out images with an increasing number of sampled levels"),
        "rows": [captions[name] for name in run.diagnosis.rows],
        "outdated": run.manifest is not None and run.manifest.priors != run.diagnosis.priors,
    }


def _curves(run: RunStatus) -> dict[str, Picture]:
    """Return the training curves by stage."""
    stages = [run.folder.autoencoder, *(run.folder.prior(level) for level in reversed(run.maps))]
    return {
        stage.path.name: load_picture(stage.curves, f"training curves of {stage.path.name}", pixelated=False)
        for stage in stages
    }


def _codebooks(run: RunStatus) -> list[list[str]]:
    """Return the rows of the table of codebooks; none before the first validation."""
    validation = run.stages["autoencoder"].metrics
    if not validation:
        return []
    return [
        [
            level,
            _map_size(spec),
            f"{spec.codebook_size:,}",
            _format(validation.get(f"usage_{level}"), ".1%"),
            _format(validation.get(f"perplexity_{level}"), ",.1f"),
        ]
        for level, spec in run.maps.items()
    ]


def _likelihood(run: RunStatus) -> dict[str, Any] | None:
    """Return the negative log-likelihood of held-out codes and of its baselines; None before the first validation."""
    if not any(run.prior(level).metrics for level in run.maps):
        return None
    rows = []
    for level, spec in run.maps.items():
        validation = run.prior(level).metrics
        values = [_format(validation.get(name), ".3f") for name in ("nll", "bits", "uniform", "unigram")]
        bits = validation["bits"] * spec.num_codes if "bits" in validation else None
        rows.append([level, _map_size(spec), *values, _format(bits, ",.0f")])
    positions = sum(spec.num_codes for spec in run.maps.values())
    rows.append(["total", f"{positions:,} codes", *[""] * 4, _format(_bits_per_image(run, "nll"), ",.0f")])
    uniform, unigram = (_bits_per_image(run, name) for name in ("uniform", "unigram"))
    height, width = run.data.shape
    complete = uniform is not None and unigram is not None
    return {
        "rows": rows,
        "baselines": {"uniform": uniform, "unigram": unigram} if complete else None,
        "pixel_bits": height * width * run.data.channels * 8,
    }


def _format(value: float | None, spec: str) -> str:
    return _MISSING if value is None else format(value, spec)


def _bits_per_image(run: RunStatus, name: str) -> float | None:
    """Return a metric in bits per image: nats per code × codes, summed over levels; None if a level lacks it."""
    levels = [(run.prior(level).metrics, spec.num_codes) for level, spec in run.maps.items()]
    if not all(name in metrics for metrics, _ in levels):
        return None
    return sum(metrics[name] * size for metrics, size in levels) / math.log(2)


def _metrics(run: RunStatus) -> dict[str, Any] | None:
    if run.metrics is None:
        return None
    return {
        "warnings": list(_metric_warnings(run, run.metrics)),
        "rows": _metric_rows(run.metrics),
        "protocol": list(_protocol(run.metrics.get("protocol", {}))),
    }


def _metric_warnings(run: RunStatus, metrics: dict[str, Any]) -> Iterator[str]:
    if run.manifest and metrics["made_from"]["samples"] != files.digest(manifest_path(run.samples)):
        yield "the metrics were measured on other samples than the ones shown here; run vqvae2 evaluate again"
    weights = run.folder.autoencoder_weights
    if weights.is_file() and metrics["made_from"]["autoencoder"] != files.digest(weights):
        yield "the metrics were measured with another autoencoder; run vqvae2 evaluate again"
    if not metrics.get("protocol", {}).get("standard_weights", True):
        yield "not the standard Inception weights, so the metrics are not comparable with others"
    yield from metrics.get("warnings", ())


def _metric_rows(metrics: dict[str, Any]) -> list[Metric]:
    """Return the table of metrics. KID comes first if there are too few images for a comparable FID."""
    rows = []
    for key, name in (("fid", "FID"), ("rfid", "rFID (reconstructions)")):
        if distance := metrics.get(key):
            rows += _missing(name, distance) or [
                Metric(name, f"{distance['value']:.2f}", distance["text"].partition(" (")[2].removesuffix(")"))
            ]
    for key, name, digits in (("kid", "KID", 5), ("inception_score", "Inception score", 2)):
        if score := metrics.get(key):
            rows += _missing(name, score) or [
                Metric(name, f"{score['mean']:.{digits}f} ± {score['std']:.{digits}f}", _NOTES[key])
            ]
    if neighborhoods := metrics.get("precision_recall"):
        rows += _missing("Precision and recall", neighborhoods) or [
            Metric(name.capitalize(), f"{value:.3f}", _NOTES[name]) for name, value in neighborhoods.items()
        ]
    if not metrics["fid"].get("comparable"):
        rows.sort(key=lambda row: row.name != "KID")
    for network, values in metrics.get("features", {}).items():
        rows += _missing(network, values) or _feature_rows(network, values)
    cas = metrics.get("cas") or {}
    for name, score in (("Classification accuracy", cas), ("… trained on real images", cas.get("real"))):
        if score:
            rows += _missing(name, score) or [Metric(name, f"{score['top1']:.1%}", _classifier_note(score))]
    if (recognized := (cas.get("real") or {}).get("recognized")) is not None:
        note = "share of the samples that the classifier of real images assigns to their class"
        rows.append(Metric("Recognized samples", f"{recognized:.1%}", note))
    return rows


def _feature_rows(network: str, values: dict[str, Any]) -> list[Metric]:
    """Return the rows of the metrics in the features of a network other than Inception."""
    rows = []
    for key, name in (("fd", "FD"), ("rfd", "rFD (reconstructions)")):
        label = f"{name} in {network}"
        rows += _missing(label, values[key]) or [
            Metric(label, f"{values[key]['value']:.2f}", values[key]["text"].partition(" (")[2].removesuffix(")"))
        ]
    label = f"Precision and recall in {network}"
    rows += _missing(label, values["precision_recall"]) or [
        Metric(label, " and ".join(f"{values['precision_recall'][name]:.3f}" for name in ("precision", "recall")))
    ]
    return rows


def _missing(name: str, metric: dict[str, Any]) -> list[Metric]:
    """Return the row of a missing metric with the reason, and no row for one that was measured."""
    return [Metric(name, _MISSING, f"not measured: {metric['missing']}")] if "missing" in metric else []


def _classifier_note(score: dict[str, Any]) -> str:
    note = f"top-1 of a {score['model']} trained on {score['trained_on']:,} images, on held-out images"
    return "; ".join(filter(None, (note, score.get("warning"))))


def _protocol(protocol: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of the evaluation; digests and versions are shown under provenance."""
    for name, value in protocol.items():
        if name in ("inception_weights", "versions"):
            continue
        for key, item in value.items() if isinstance(value, dict) else ((None, value),):
            if key not in ("autoencoder", "priors") and item not in (None, {}, []):
                yield f"{name}, {key}" if key else name, item


def _timings(run: RunStatus) -> list[list[str]]:
    """Return the rows of the table of durations, with the total; none before the first stage is finished."""
    timed = [(name, stage.detail, stage.seconds) for name, stage in run.stages.items() if stage.seconds is not None]
    if not timed:
        return []
    rows = [[name, detail, format_duration(seconds)] for name, detail, seconds in timed]
    return [*rows, ["total", "", format_duration(sum(seconds for *_, seconds in timed))]]


def _provenance(run: RunStatus) -> dict[str, dict[str, Any]]:
    """Return the digests of weights and samples, and the versions of libraries, as far as known."""
    manifest, metrics = run.manifest, run.metrics or {}
    protocol = metrics.get("protocol", {})
    digests = {}
    if manifest:
        digests["autoencoder"] = manifest.autoencoder
        digests |= {f"prior-{level}": digest for level, digest in zip(run.maps, manifest.priors, strict=False)}
    digests |= {
        "evaluated samples": metrics.get("made_from", {}).get("samples"),
        "Inception weights": protocol.get("inception_weights"),
        **{f"{network} weights": values.get("weights") for network, values in metrics.get("features", {}).items()},
    }
    return {
        "digests": {name: digest for name, digest in digests.items() if digest},
        "versions": ({"torch": manifest.torch} if manifest else {}) | protocol.get("versions", {}),
    }


def main(options: ReportOptions) -> None:
    """Run the command `vqvae2 report`."""
    print(write_report(options.run, options.samples))
