"""The command `vqvae2 report`: one page that shows a whole run, finished or not, in one file that needs no other.

It is made of what the stages have left in the run folder (settings, JSON, pictures) and of nothing else: no weights are
read, nothing is measured, and the same run gives the same page.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sampling.report import page
from sampling.report.run_status import RunStatus, read_run
from vqvae2 import files
from vqvae2.code_maps import MapSpec
from vqvae2.run_folder import RunFolder

_NONE = "–"
_CLASSES = 24  # that a caption names
_ROWS = {"reconstruction": "all codes true", "sampled": "all codes sampled"}  # of the diagnosis
_NOTES = {
    "KID": "unbiased for any number of images; lower is better",
    "Inception score": "higher is better; it does not see the reference",
    "Precision": "share of samples that lie among the reference",
    "Recall": "share of the reference that lies among the samples",
    "Density": "how densely the reference lies around a sample; may exceed 1",
    "Coverage": "share of the reference with a sample close by",
}


def write_report(run: Path, samples: Path | None = None) -> Path:
    """Write report.html into a run folder, about the images in `samples` (RUN/samples by default); its path.

    UserError where `run` is not a run folder or a file in it is damaged; a stage that is not finished is no error.
    """
    view = read_run(RunFolder.existing(run), samples)
    sections = (_header, _reconstructions, _samples, _diagnosis, _curves, _codebooks, _likelihood, _metrics, _timings)
    text = page.page(view.name, (section(view) for section in (*sections, _origin)))
    path = view.folder.path / "report.html"
    # StringTable of files that are no UTF-8 reach Python as lone surrogates, which cannot be written.
    files.write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def _header(view: RunStatus) -> str:
    """The name of the run, how far each stage is, and the figures that sum it up."""
    source = "built-in scenes" if view.data.path == "scenes" else Path(view.data.path).name
    maps = " + ".join(map(_map, view.maps.values()))
    unfinished = any(stage.state != "finished" for stage in view.stages.values())
    parts = (
        f"<header>\n<h1>{page.escape(view.name)}</h1>",
        page.note(f"{source}, {view.data.shape[0]} × {view.data.shape[1]} pixels, as {maps} codes"),
        page.note("Not finished yet; the same vqvae2 run command goes on with it.", "warn") if unfinished else "",
        page.stages((name, stage.state, stage.detail) for name, stage in view.stages.items()),
        page.figures(_highlights(view)),
        "</header>",
    )
    return "\n".join(filter(None, parts))


def _highlights(view: RunStatus) -> Iterator[tuple[str, str, str]]:
    found = view.stages["autoencoder"].values
    if "psnr" in found:
        yield "PSNR of reconstructions", f"{found['psnr']:.2f}", "dB"
        yield "SSIM of reconstructions", f"{found['ssim']:.3f}", ""
    if (bits := _bits(view, "nll")) is not None:
        yield "Codes of an image", f"{bits:,.0f}", "bits"
    for name, value, _ in _measures(view.metrics)[:1] if view.metrics else ():
        yield name, value, ""


def _reconstructions(view: RunStatus) -> str:
    preview = _newest(view.folder.autoencoder / "previews")
    caption = f"Held-out images, each over its reconstruction{_after(preview)}."
    return page.section("Reconstructions", page.picture(preview, "held-out images over their reconstructions", caption))


def _samples(view: RunStatus) -> str:
    """The sampled images, and what each prior adds to held-out images."""
    caption = _about_samples(view.manifest) if view.manifest else ""
    parts = [page.picture(view.samples / "grid.png", "sampled images, which need all priors", caption)]
    for level in reversed(view.maps):
        preview = _newest(view.folder.prior(level) / "previews")
        caption = f"Held-out images over the same with this level sampled{_after(preview)}; finer levels left out."
        parts += [
            page.heading(f"The {level} level sampled"),
            page.picture(preview, f"held-out images over the same with the {level} level sampled", caption),
        ]
    return page.section("Samples", *parts)


def _diagnosis(view: RunStatus) -> str:
    """Held-out images with more and more of their codes sampled, and what the numbers warn of."""
    parts = [page.note(f"{warning[:1].upper()}{warning[1:]}.", "warn") for warning in view.warnings]
    if view.diagnosis is None:
        missing = page.missing("Not diagnosed yet; vqvae2 diagnose shows which part makes samples look wrong.")
        return page.section("Diagnosis", *parts, missing)
    levels = {f"true-{level}": f"true codes from the {level} level up" for level in view.maps} | _ROWS
    names = [levels[name] for name in view.diagnosis["rows"]]
    caption = (
        f"The same held-out images, row by row: {'; '.join(names)}. If the first row looks wrong, the autoencoder is "
        "the cause; if one between does, the prior of a level sampled there; if only the last does, the top prior."
    )
    if view.manifest and view.manifest["priors"] != view.diagnosis["priors"]:
        parts.append(page.note("Made with other weights than the samples; diagnose again.", "warn"))
    picture = view.folder.path / "diagnosis" / "diagnosis.png"
    shown = page.picture(picture, "held-out images with more and more of their codes sampled", caption)
    return page.section("Diagnosis", *parts, shown)


def _about_samples(manifest: dict[str, Any]) -> str:
    about = f"{manifest['count']:,} images in all; seed {manifest['seed']}, {page.spell(manifest['sampling_params'])}."
    labels: list[int] = manifest["labels"] or []
    used = list(dict.fromkeys(labels))
    if not used:
        return about
    names = [manifest["class_names"][label] for label in used]
    by_turns = all(label == used[index % len(used)] for index, label in enumerate(labels))
    more = f" and {len(names) - _CLASSES:,} more" if len(names) > _CLASSES else ""
    return f"{about} Classes{' by turns, row by row' if by_turns else ''}: {', '.join(names[:_CLASSES])}{more}."


def _curves(view: RunStatus) -> str:
    parts = ['<div class="charts">']
    for name in ("autoencoder", *(f"prior-{level}" for level in reversed(view.maps))):
        drawn = page.picture(view.folder.path / name / "curves.png", f"curves of {name}", crisp=False)
        parts.append(f'<div class="chart{" wide" if name == "autoencoder" else ""}">{drawn}</div>')
    return page.section("Curves", *parts, "</div>")


def _codebooks(view: RunStatus) -> str:
    """How much of each codebook the held-out images use, and how evenly."""
    found = view.stages["autoencoder"].values
    if not found:
        return page.section("Codebooks", page.missing("No validation of the autoencoder yet."))
    rows = []
    for level, spec in view.maps.items():
        usage, perplexity = found[f"usage_{level}"], found[f"perplexity_{level}"]
        rows.append((level, _map(spec), f"{spec.codebook_size:,}", f"{usage:.1%}", f"{perplexity:,.1f}"))
    about = "Over all held-out images. Perplexity is how many evenly used codes would carry as much."
    header = ("Level", "Map", "Codebook", "In use", "Perplexity")
    return page.section("Codebooks", page.table(header, rows), page.note(about))


def _likelihood(view: RunStatus) -> str:
    """What the priors know about held-out codes, beside what knowing nothing or only frequencies would give."""
    if not any(view.prior(level).values for level in view.maps):
        return page.section("Likelihood", page.missing("No validation of a prior yet."))
    rows = []
    for level, spec in view.maps.items():
        found = view.prior(level).values
        shown = [f"{found[name]:.3f}" if found else _NONE for name in ("nll", "bits", "uniform", "unigram")]
        rows.append((level, _map(spec), *shown, f"{found['bits'] * spec.num_codes:,.0f}" if found else _NONE))
    bits, uniform, unigram = (_bits(view, name) for name in ("nll", "uniform", "unigram"))
    positions = sum(spec.num_codes for spec in view.maps.values())
    rows.append(("all levels", f"{positions:,} codes", *[""] * 4, _NONE if bits is None else f"{bits:,.0f}"))
    height, width = view.data.shape
    about = "Negative log-likelihood of the codes of held-out images, per code. The sum needs every level."
    if uniform is not None and unigram is not None:
        about = (
            "Negative log-likelihood of the codes of held-out images, per code, beside a uniform guess and the "
            f"frequency of each code alone. These two would take {uniform:,.0f} and {unigram:,.0f} bits per image; "
            f"its pixels are {height * width * view.data.channels * 8:,}."
        )
    header = ("Level", "Map", "NLL, nats", "NLL, bits", "Uniform, nats", "Unigram, nats", "Bits per image")
    return page.section("Likelihood", page.table(header, rows, total=True), page.note(about))


def _bits(view: RunStatus, name: str) -> float | None:
    """Bits per image: nats per code × codes in a map, over all levels; None until every prior has been validated."""
    found = [(view.prior(level).values, spec.num_codes) for level, spec in view.maps.items()]
    if not all(values for values, _ in found):
        return None
    return sum(values[name] * size for values, size in found) / math.log(2)


def _metrics(view: RunStatus) -> str:
    """What evaluation measured on the samples, with its protocol."""
    if view.metrics is None:
        return page.section("Metrics", page.missing("Not evaluated yet."))
    parts = [page.note(warning, "warn") for warning in _warnings(view, view.metrics)]
    if rows := _measures(view.metrics):
        parts.append(page.table(("Measure", "Value", "Note"), rows, words=("Note",)))
    if view.metrics["fid"]["value"] is None:
        parts.append(page.missing(f"FID {view.metrics['fid']['text']}"))
    if protocol := list(_protocol(view.metrics.get("protocol", {}))):
        parts += [page.heading("Protocol"), page.facts(protocol)]
    return page.section("Metrics", *parts)


def _warnings(view: RunStatus, metrics: dict[str, Any]) -> Iterator[str]:
    if view.manifest and metrics["made_from"]["samples"] != files.digest(view.samples / "manifest.json"):
        yield "Measured on other samples than the ones shown here; evaluate again."
    if not metrics.get("protocol", {}).get("standard_weights", True):
        yield "Not the standard Inception weights: compare with no other numbers."
    for warning in metrics.get("warnings", ()):
        yield f"{warning[:1].upper()}{warning[1:]}."


def _protocol(protocol: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was compared with what and how; digests and versions stand elsewhere on the page."""
    for name, value in protocol.items():
        if name in ("inception_weights", "versions"):
            continue
        for key, item in value.items() if isinstance(value, dict) else ((None, value),):
            if key not in ("autoencoder", "priors") and item not in (None, {}, []):
                yield f"{name}, {key}" if key else name, item


def _measures(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, note), the one to look at first at the front: KID where there are too few images for an FID."""
    rows = []
    for key, name in (("fid", "FID"), ("rfid", "FID of reconstructions")):
        if (found := metrics.get(key)) and found["value"] is not None:
            rows.append((name, f"{found['value']:.2f}", found["text"].partition(" (")[2].removesuffix(")")))
    for key, name, digits in (("kid", "KID", 5), ("inception_score", "Inception score", 2)):
        if found := metrics.get(key):
            rows.append((name, f"{found['mean']:.{digits}f} ± {found['std']:.{digits}f}", _NOTES[name]))
    for name, value in metrics.get("precision_recall", {}).items():
        rows.append((name.capitalize(), f"{value:.3f}", _NOTES[name.capitalize()]))
    if not metrics["fid"].get("comparable"):
        rows.sort(key=lambda row: row[0] != "KID")
    accuracy = metrics.get("cas", {})
    for name, found in (("Classification accuracy", accuracy), ("… trained on real images", accuracy.get("real"))):
        if found:
            note = f"top-1 of a {found['model']} trained on {found['trained_on']:,} images, on held-out images"
            rows.append((name, f"{found['top1']:.1%}", "; ".join(filter(None, (note, found.get("warning"))))))
    return rows


def _timings(view: RunStatus) -> str:
    timed = [(name, stage.detail, stage.seconds) for name, stage in view.stages.items() if stage.seconds is not None]
    if not timed:
        return page.section("Time", page.missing("No stage is finished yet."))
    rows = [(name, detail, page.duration(seconds)) for name, detail, seconds in timed]
    rows.append(("together", "", page.duration(sum(seconds for *_, seconds in timed))))
    return page.section("Time", page.table(("Stage", "Work", "Time"), rows, total=True))


def _origin(view: RunStatus) -> str:
    """Every setting, and what everything was made from."""
    settings = page.folded("config.yaml", view.folder.config.read_text(encoding="utf-8"))
    manifest, metrics = view.manifest or {}, view.metrics or {}
    protocol = metrics.get("protocol", {})
    digests = {"autoencoder": manifest.get("autoencoder")}
    digests |= {f"prior-{level}": digest for level, digest in zip(view.maps, manifest.get("priors", ()), strict=False)}
    digests |= {
        "evaluated samples": metrics.get("made_from", {}).get("samples"),
        "Inception weights": protocol.get("inception_weights"),
    }
    made_from = [(name, value) for name, value in digests.items() if value]
    versions = {"torch": manifest.get("torch")} | protocol.get("versions", {})
    parts = [
        page.heading("SHA-256"),
        page.facts(made_from, "digest"),
        page.heading("Versions"),
        page.facts(versions.items()),
    ]
    origin = parts if made_from else [page.missing("Digests and versions are noted when images are sampled.")]
    return page.section("Settings", settings) + "\n" + page.section("Made from", *origin)


def _map(spec: MapSpec) -> str:
    return f"{spec.height} × {spec.width}"


def _newest(previews: Path) -> Path | None:
    return max(previews.glob("*.png"), default=None)


def _after(preview: Path | None) -> str:
    """When a preview was made, which its name says."""
    return f", after {int(preview.stem):,} steps" if preview and preview.stem.isdigit() else ""


def main(arguments: list[str]) -> None:
    """The command `vqvae2 report`."""
    parser = argparse.ArgumentParser(prog="vqvae2 report", description="Show a whole run, finished or not, on a page.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--samples", type=Path, help="folder that `vqvae2 sample` wrote; RUN/samples by default")
    options = parser.parse_args(arguments)
    print(write_report(options.run, options.samples))
