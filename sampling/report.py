"""The command `vqvae2 report`: one page that shows a whole run, finished or not, in one file that needs no other.

It is made of what the stages have left in the run folder (settings, JSON, pictures) and of nothing else, so the same
run gives the same page. No network is loaded and nothing is measured.
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image

from vqvae2 import files
from vqvae2.config import read_yaml
from vqvae2.data.images import DataConfig
from vqvae2.errors import UserError
from vqvae2.maps import MapSpec
from vqvae2.models import AutoencoderConfig
from vqvae2.run_folder import RunFolder, level_names

_COLUMN = 1042  # pixels across the page's column; a picture no wider is shown pixel by pixel
_WIDEST = 2112  # of a picture in the page; a wider one is shrunk, or the page would be hundreds of megabytes
_NONE = "–"
_CLASSES = 24  # that a caption names
_NOTES = {
    "KID": "unbiased whatever the number of images; lower is better",
    "Inception score": "higher is better; blind to what the reference looks like",
    "Precision": "share of samples that lie among the reference",
    "Recall": "share of the reference that lies among the samples",
    "Density": "how densely the reference surrounds a sample; may exceed 1",
    "Coverage": "share of reference images with a sample close by",
}


@dataclass(frozen=True)
class Stage:
    """How far one stage is, and what it measured."""

    title: str
    state: str  # "finished", "under way" or "not yet"
    detail: str = ""
    seconds: float | None = None
    values: dict[str, float] | None = None  # of the last validation


@dataclass(frozen=True)
class View:
    """What a run folder holds, as the page needs it."""

    folder: RunFolder
    samples: Path
    data: DataConfig
    maps: dict[str, MapSpec]  # by level, finest first
    stages: dict[str, Stage]
    manifest: dict[str, Any] | None
    metrics: dict[str, Any] | None

    def values(self, stage: str) -> dict[str, float]:
        """What a stage measured last; empty where it has not."""
        return self.stages[stage].values or {}


def write_report(run: Path, samples: Path | None = None) -> Path:
    """Write report.html into a run folder, about the images in `samples` (RUN/samples by default); its path.

    UserError where `run` is not a run folder or a file in it is damaged; a stage that is not finished is no error.
    """
    view = _read(RunFolder.existing(run), samples)
    sections = (_header, _reconstructions, _samples, _curves, _codebooks, _likelihood, _metrics, _timings, _facts)
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    text = template.substitute(title=_escape(view.name), body="\n".join(section(view) for section in sections))
    path = view.folder.path / "report.html"
    # Names of files that are no UTF-8 reach Python as lone surrogates, which cannot be written.
    files.write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def _read(folder: RunFolder, samples: Path | None) -> View:
    config = read_yaml(folder.config)
    samples = samples or folder.samples
    try:
        section = {name: config["autoencoder"][name] for name in AutoencoderConfig.model_fields}
        names = level_names(len(section["levels"]))
        steps = {f"prior-{name}": config["priors"][name]["training"]["steps"] for name in reversed(names)}
        steps = {"autoencoder": config["autoencoder"]["training"]["steps"]} | steps
    except (KeyError, TypeError):
        raise UserError(f"{folder.config}: not the resolved config of a run; `vqvae2 run` writes one") from None
    data = DataConfig.parse(config.get("data", {}), str(folder.config), "data")
    with torch.device("meta"):
        network = AutoencoderConfig.parse(section, str(folder.config), "autoencoder").build(data.shape, data.channels)
    training = {name: _training_stage(folder.path / name, count) for name, count in steps.items()}
    stages = {
        "autoencoder": training.pop("autoencoder"),
        "codes": _codes_stage(folder),
        **training,
        "samples": _samples_stage(samples),
        "evaluation": Stage("finished") if folder.metrics.is_file() else Stage("not yet"),
    }
    maps = dict(zip(names, network.maps, strict=True))
    return View(folder, samples, data, maps, stages, _json(samples / "manifest.json"), _json(folder.metrics))


def _training_stage(folder: Path, steps: int) -> Stage:
    """A trained network's stage: its summary, or the end of its history while it is under way."""
    summary = _json(folder / "summary.json") or {}
    if (folder / "model.safetensors").is_file():
        return Stage("finished", f"{steps:,} steps", summary.get("seconds"), summary.get("validation"))
    step, values = 0, {}
    history = folder / "history.jsonl"
    for line in history.read_text(encoding="utf-8").splitlines() if history.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line that a killed process may leave
        step = entry["step"]
        values |= {name.removeprefix("validation/"): value for name, value in entry.items()}
    return Stage("under way", f"step {step:,} of {steps:,}", None, values) if step else Stage("not yet")


def _codes_stage(folder: RunFolder) -> Stage:
    if summary := _json(folder.codes / "summary.json"):
        return Stage("finished", "", summary["seconds"])
    return Stage("under way" if folder.codes.is_dir() else "not yet")


def _samples_stage(samples: Path) -> Stage:
    manifest = _json(samples / "manifest.json")
    if manifest is None:
        return Stage("not yet")
    seconds = (_json(samples / "summary.json") or {}).get("seconds")
    found, count = len(list((samples / "images").glob("*.png"))), manifest["count"]
    if found < count:
        return Stage("under way", f"{found:,} of {count:,} images", seconds)
    return Stage("finished", f"{count:,} images", seconds)


def _header(view: View) -> str:
    """The name of the run, how far each stage is, and the figures that sum it up."""
    source = "built-in scenes" if view.data.path == "scenes" else Path(view.data.path).name
    maps = " + ".join(f"{spec.height}×{spec.width}" for spec in view.maps.values())
    height, width = view.data.shape
    stages = "".join(
        f'<li class="{stage.state.replace(" ", "-")}"><b>{name}</b>'
        f"<span>{' · '.join(filter(None, (stage.state, stage.detail)))}</span></li>"
        for name, stage in view.stages.items()
    )
    figures = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{value} <small>{unit}</small></dd></div>"
        for name, value, unit in _figures_of_merit(view)
    )
    unfinished = any(stage.state != "finished" for stage in view.stages.values())
    more = "<p>This run is not finished; the same <code>vqvae2 run</code> command goes on with it.</p>"
    return (
        f'<header>\n<h1>{_escape(view.name)}</h1>\n<p class="quiet">{_escape(source)}, {height}×{width} pixels, '
        f"as {maps} codes</p>\n{more if unfinished else ''}"
        f'<ol class="stages">{stages}</ol>\n{f"""<dl class="figures">{figures}</dl>""" if figures else ""}\n</header>'
    )


def _figures_of_merit(view: View) -> Iterable[tuple[str, str, str]]:
    found = view.values("autoencoder")
    if "psnr" in found:
        yield "Reconstruction, PSNR", f"{found['psnr']:.2f}", "dB"
        yield "Reconstruction, SSIM", f"{found['ssim']:.3f}", ""
    if (bits := _bits(view, "bits")) is not None:
        yield "Codes of an image", f"{bits:,.0f}", "bits"
    for name, value, _ in _measures(view.metrics or {})[:1]:
        if value != _NONE:
            yield name, value, ""


def _reconstructions(view: View) -> str:
    found = view.values("autoencoder")
    measured = f" PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.3f} over all of them." if "psnr" in found else ""
    preview = _newest(view.folder.autoencoder / "previews")
    caption = f"Held-out images, each over its reconstruction{_after(preview)}.{measured}"
    return _section("Reconstructions", _picture(preview, "The autoencoder has made no picture yet.", caption))


def _samples(view: View) -> str:
    """The sampled images, and what each prior adds to held-out images."""
    manifest = view.manifest or {}
    choice = manifest.get("choice", {})
    settings = [
        f"seed {manifest.get('seed')}",
        *(f"{name.replace('_', '-')} {value}" for name, value in choice.items()),
    ]
    caption = f"{manifest.get('count', 0):,} images in all; {', '.join(settings)}."
    if labels := manifest.get("labels"):
        names = [manifest["class_names"][label] for label in dict.fromkeys(labels)]
        more = f" and {len(names) - _CLASSES} more" if len(names) > _CLASSES else ""
        caption += f" Classes by turns, row by row: {', '.join(names[:_CLASSES])}{more}."
    parts = [_picture(view.samples / "grid.png", "No samples yet; they need all priors.", caption)]
    for level in reversed(view.maps):
        preview = _newest(view.folder.prior(level) / "previews")
        caption = (
            f"Held-out images over the same with the level {level} sampled{_after(preview)}; finer levels left out."
        )
        picture = _picture(preview, f"The prior of the level {level} has made no picture yet.", caption)
        parts.append(f"<h3>What the {level} prior adds</h3>\n{picture}")
    return _section("Samples", *parts)


def _curves(view: View) -> str:
    parts = []
    for name in ("autoencoder", *(f"prior-{level}" for level in reversed(view.maps))):
        picture = view.folder.path / name / "curves.png"
        wide = " wide" if name == "autoencoder" else ""
        parts.append(f'<div class="chart{wide}">{_picture(picture, f"No curves of {name} yet.", "", name)}</div>')
    return _section("Curves", f'<div class="charts">{"".join(parts)}</div>')


def _codebooks(view: View) -> str:
    """How much of each codebook the held-out images use, and how evenly."""
    found = view.values("autoencoder")
    if "mse" not in found:
        return _section("Codebooks", _missing("No validation of the autoencoder yet."))
    rows = []
    for level, spec in view.maps.items():
        usage, perplexity = found[f"usage_{level}"], found[f"perplexity_{level}"]
        rows.append((level, _map(spec), f"{spec.codes:,}", f"{usage:.1%}", f"{perplexity:,.1f}"))
    note = "Perplexity is how many evenly used codes would carry as much, over the codes of all held-out images."
    return _section("Codebooks", _table(("Level", "Map", "Codes", "In use", "Perplexity"), rows), _quiet(note))


def _likelihood(view: View) -> str:
    """What the priors know about held-out codes, beside what knowing nothing or only frequencies would give."""
    rows = []
    for level, spec in reversed(view.maps.items()):
        found = view.values(f"prior-{level}")
        shown = [f"{found[name]:.3f}" if name in found else _NONE for name in ("nll", "bits", "uniform", "unigram")]
        bits = f"{found['bits'] * spec.size:,.0f}" if "bits" in found else _NONE
        rows.append((level, _map(spec), *shown, bits))
    total = _bits(view, "bits")
    rows.append(("all levels", f"{sum(spec.size for spec in view.maps.values()):,} codes", *[""] * 4, _whole(total)))
    note = f"{_NONE}: this prior has not been validated yet; all levels together need every one of them."
    if (uniform := _bits(view, "uniform")) is not None and (unigram := _bits(view, "unigram")) is not None:
        note = (
            f"Held-out images. All levels together would take {_whole(uniform / _LN2)} bits with uniform codes and "
            f"{_whole(unigram / _LN2)} with the frequency of each code alone; the image itself holds "
            f"{view.data.shape[0] * view.data.shape[1] * view.data.channels * 8:,}."
        )
    header = ("Level", "Map", "NLL, nats", "Bits per code", "Uniform, nats", "Unigram, nats", "Bits per image")
    return _section("Likelihood", _table(header, rows, total=True), _quiet(note))


def _bits(view: View, name: str) -> float | None:
    """Sum over levels of a value per code × codes in a map; None until every prior has been validated."""
    found = [(view.values(f"prior-{level}").get(name), spec.size) for level, spec in view.maps.items()]
    return None if any(value is None for value, _ in found) else sum(value * size for value, size in found if value)


def _metrics(view: View) -> str:
    """What evaluation measured on the samples, with its protocol."""
    if view.metrics is None:
        return _section("Metrics", _missing("Not evaluated yet; vqvae2 evaluate measures the samples."))
    parts = []
    if view.manifest and view.metrics["made_from"]["samples"] != files.digest(view.samples / "manifest.json"):
        parts.append('<p class="warn">Measured on other samples than the ones shown; evaluate again.</p>')
    protocol = view.metrics.get("protocol", {})
    if not protocol.get("standard_weights", True):
        parts.append('<p class="warn">Not the standard Inception weights: compare these numbers with no others.</p>')
    parts.append(_table(("Measure", "Value", "Note"), _measures(view.metrics), kind="notes"))
    if protocol:
        rows = [(name, value) for name, value in protocol.items() if name not in ("inception_weights", "versions")]
        parts.append(f"<h3>Protocol</h3>\n{_list(rows)}")
    return _section("Metrics", *parts)


def _measures(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, note), the one to look at first at the front: KID where too few images make an FID."""
    rows = []
    for key, name in (("fid", "FID"), ("rfid", "FID of reconstructions")):
        if found := metrics.get(key):
            value = found["value"]
            note = found["text"] if value is None else found["text"].partition(" (")[2].removesuffix(")")
            rows.append((name, _NONE if value is None else f"{value:.2f}", note))
    for key, name, digits in (("kid", "KID", 5), ("inception_score", "Inception score", 2)):
        if found := metrics.get(key):
            rows.append((name, f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}", _NOTES[name]))
    for name, value in metrics.get("manifold", {}).items():
        rows.append((name.capitalize(), f"{value:.3f}", _NOTES[name.capitalize()]))
    if metrics and not metrics["fid"].get("comparable"):
        rows.sort(key=lambda row: row[0] != "KID")
    return rows


def _timings(view: View) -> str:
    timed = {name: stage for name, stage in view.stages.items() if stage.seconds is not None}
    if not timed:
        return _section("Time", _missing("No stage is finished yet."))
    rows = [(name, stage.detail, _duration(stage.seconds or 0)) for name, stage in timed.items()]
    rows.append(("together", "", _duration(sum(stage.seconds or 0 for stage in timed.values()))))
    return _section("Time", _table(("Stage", "Work", "Time"), rows, total=True))


def _facts(view: View) -> str:
    """What everything was made from, and every setting."""
    manifest, metrics = view.manifest or {}, view.metrics or {}
    protocol = metrics.get("protocol", {})
    digests = {"autoencoder": manifest.get("autoencoder")}
    digests |= {f"prior-{level}": digest for level, digest in zip(view.maps, manifest.get("priors", ()), strict=False)}
    digests |= {"samples": metrics.get("made_from", {}).get("samples"), "Inception": protocol.get("inception_weights")}
    rows = [(name, value) for name, value in digests.items() if value]
    versions = {"torch": manifest.get("torch")} | protocol.get("versions", {})
    known = [(name, value) for name, value in versions.items() if value]
    settings = view.folder.config.read_text(encoding="utf-8")
    return "\n".join(
        (
            _section("Settings", f"<details><summary>config.yaml</summary><pre>{_escape(settings)}</pre></details>"),
            _section(
                "Made from",
                _list(rows, "digest") + _quiet("SHA-256 of each file")
                if rows
                else _missing("No digests before sampling."),
                f"<h3>Versions</h3>\n{_list(known)}" if known else "",
            ),
        )
    )


def _picture(path: Path | None, missing: str, caption: str, alt: str = "") -> str:
    """A picture with all its bytes in the page, or the words that say it is missing."""
    if path is None or not path.is_file():
        return _missing(missing)
    try:
        with Image.open(path) as image:
            width, height = image.size
            content = path.read_bytes() if width <= _WIDEST else _shrunk(image)
    except OSError as error:
        raise UserError(f"{path}: not a readable picture ({error}); delete it and make it again") from None
    crisp = ' class="crisp"' if width <= _COLUMN else ""
    words = _escape(alt or caption)
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    note = f"\n<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll"><img{crisp} alt="{words}" width="{width}" height="{height}" src="{source}"></div>'
        f"{note}</figure>"
    )
