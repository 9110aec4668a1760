"""Tests for the HTML report: content, escaping, determinism, and rendering in a browser."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.evaluation.diagnose import diagnose_run
from sampling.report.formatting import format_duration
from sampling.report.picture import load_picture
from sampling.report.report import write_report
from sampling.run_config import RunConfig
from tests.test_commands import fails
from vqvae2 import checkpoint, files
from vqvae2.__main__ import main
from vqvae2.errors import UserError

HOSTILE = "<script>alert(1)</script>"
SECTIONS = (
    *("Reconstructions", "Samples", "Diagnosis", "Curves", "Codebooks", "Likelihood"),
    *("Metrics", "Time", "Settings", "Provenance"),
)
URL_ATTRIBUTES = {"src", "href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Tags with attributes, headings and text of a report, parsed from the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def check_self_contained(self) -> None:
        assert {tag for tag, _ in self.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
        for _, attributes in self.tags:
            assert not any(name.startswith("on") for name in attributes)
            for name in URL_ATTRIBUTES & attributes.keys():
                assert str(attributes[name]).startswith("data:image/png;base64,")

    def pictures(self) -> list[Image.Image]:
        """Return all images, decoded, after checking that their sizes match the attributes."""
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                assert attributes["alt"]
                picture = Image.open(io.BytesIO(base64.b64decode(str(attributes["src"]).partition(",")[2])))
                picture.load()
                assert (str(picture.width), str(picture.height)) == (attributes["width"], attributes["height"])
                found.append(picture)
        return found


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with a metrics.json like the one `vqvae2 evaluate` writes."""
    run = shutil.copytree(finished_run, tmp_path / "copy")
    samples = files.digest(run / "samples" / "manifest.json")
    autoencoder = files.digest(run / "autoencoder" / "model.safetensors")
    few = "too few images for a comparable FID"
    fid = {"value": 123.456, "text": f"123.46 (5 samples, 20 reference; {few})", "comparable": False}
    metrics = {
        "made_from": {"samples": samples, "autoencoder": autoencoder, "reference": "validation"},
        "reconstruction": {"mse": 0.01, "psnr": 20.0, "ssim": 0.5},
        "codes": {},
        "likelihood": {},
        "bits_per_image": 300.0,
        "bits_per_dimension": 0.1,
        "fid": fid,
        "rfid": {"value": 65.4, "text": f"65.40 (20 images; {few})", "comparable": False},
        "kid": {"mean": 0.0123, "std": 0.004},
        "inception_score": {"mean": 2.5, "std": 0.25},
        "precision_recall": {"precision": 0.125, "recall": 0.25, "density": 1.5, "coverage": 0.75},
        "warnings": [],
        "protocol": {
            "samples": {
                "count": 5,
                "size": [32, 32],
                "formats": {"png": 5},
                "seed": 0,
                "sampling_params": {},
                "autoencoder": "a" * 64,
                "priors": [],
            },
            "reference": {"name": "validation", "split": None, "count": 20, "size": None, "formats": {}},
            "resize": "bicubic, antialiased",
            "crop": "center",
            "inception_weights": "b" * 64,
            "standard_weights": True,
            "versions": {"torch": "9.8.7", "scipy": "6.5.4"},
        },
    }
    files.write_json(run / "evaluation" / "metrics.json", metrics)
    return run


def change(path: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    files.write_json(path, value)


def test_report_command_writes_a_self_contained_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    report = Page(run / "report.html")
    report.check_self_contained()
    assert tuple(report.headings) == SECTIONS
    assert len(report.pictures()) == 7  # reconstructions, samples, two priors, three training curves
    assert "No image yet" not in report.text
    assert "not finished" not in report.text
    with Image.open(run / "samples" / "grid.png") as grid:
        assert np.array_equal(np.array(report.pictures()[1]), np.array(grid))


def test_report_shows_all_measurements(run: Path) -> None:
    text = Page(write_report(run)).text
    found = json.loads((run / "autoencoder" / "summary.json").read_text())["validation"]
    assert f"{found['psnr']:.2f}" in text
    bits = 0.0
    for level, codes, positions in (("bottom", 16, 64), ("top", 12, 16)):
        side = int(positions**0.5)
        assert (
            f"{level} {side} × {side} {codes} {found[f'usage_{level}']:.1%} {found[f'perplexity_{level}']:.1f}" in text
        )
        nll = json.loads((run / f"prior-{level}" / "summary.json").read_text())["validation"]
        row = [f"{nll[name]:.3f}" for name in ("nll", "bits", "uniform", "unigram")]
        assert f"{level} {side} × {side} {' '.join(row)} {nll['bits'] * positions:,.0f}" in text
        bits += nll["bits"] * positions
    assert f"total 80 codes {bits:,.0f}" in text
    assert f"Code likelihood {bits:,.0f} bits per image" in text
    assert f"{32 * 32 * 3 * 8:,}" in text
    assert "1.500" in text
    assert "samples, size 32 × 32" in text
    manifest = json.loads((run / "samples" / "manifest.json").read_text())
    for words in (manifest["autoencoder"], *manifest["priors"], "b" * 64, "scipy 6.5.4", "learning_rate: 0.0003"):
        assert words in text


def test_kid_comes_first_unless_fid_is_comparable(run: Path) -> None:
    text = Page(write_report(run)).text
    assert "Metric Value Note KID 0.01230 ± 0.00400" in text
    assert "FID 123.46 5 samples, 20 reference; too few images for a comparable FID" in text
    fid = {"value": 12.5, "text": "12.50 (5000 samples, 5000 reference)", "comparable": True}
    change(run / "evaluation" / "metrics.json", lambda metrics: metrics.update(fid=fid))
    assert "Metric Value Note FID 12.50 5000 samples, 5000 reference" in Page(write_report(run)).text


def test_metrics_of_other_samples_or_weights_give_warnings(run: Path) -> None:
    assert "evaluate again" not in Page(write_report(run)).text
    change(run / "samples" / "manifest.json", lambda manifest: manifest.update(seed=7))
    change(run / "evaluation" / "metrics.json", lambda metrics: metrics["protocol"].update(standard_weights=False))
    change(run / "evaluation" / "metrics.json", lambda metrics: metrics.update(warnings=["sizes differ"]))
    text = Page(write_report(run)).text
    for words in ("The metrics were measured on other samples", "Not the standard Inception weights", "Sizes differ."):
        assert words in text


def changed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the contents of a weights file with other metadata, and thus another digest."""
    tensors, metadata = checkpoint.load(path)
    return tensors, metadata | {"made_from": metadata["made_from"] | {"note": "changed"}}


def test_other_networks_than_those_of_the_samples_and_metrics_give_warnings(run: Path) -> None:
    text = Page(write_report(run)).text
    assert "Made with another" not in text
    assert "another autoencoder" not in text
    path = run / "prior-top" / "model.safetensors"
    checkpoint.save(path, *changed(path))
    text = Page(write_report(run)).text
    assert "Made with another prior-top than the one in this run. Run vqvae2 sample and this command again." in text
    path = run / "autoencoder" / "model.safetensors"
    tensors, metadata = checkpoint.load(path)
    checkpoint.save(path, tensors, metadata | {"made_from": {}})
    text = Page(write_report(run)).text
    assert "Made with another autoencoder than the one in this run. Run vqvae2 sample and this command again." in text
    assert "The metrics were measured with another autoencoder; run vqvae2 evaluate again." in text


def test_report_is_deterministic(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob(".*"))


def test_report_escapes_names_and_values(run: Path, tmp_path: Path) -> None:
    # File names cannot contain a slash, so this tag is an image instead of a script.
    hostile = run.rename(tmp_path / "<img src=x onerror=alert(1)>&amp;'\"")
    change(hostile / "samples" / "manifest.json", lambda manifest: manifest.update(class_names=[HOSTILE] * 10))
    change(hostile / "evaluation" / "metrics.json", lambda metrics: metrics.update(fid={"missing": HOSTILE}))
    change(
        hostile / "evaluation" / "metrics.json",
        lambda metrics: metrics["protocol"].update(resize=HOSTILE, crop='"><b>', versions={HOSTILE: HOSTILE}),
    )
    config = RunConfig.from_resolved_yaml(hostile / "config.yaml")
    data = config.data.model_copy(update={"path": f"/images/x{HOSTILE}"})
    (hostile / "config.yaml").write_text(config.model_copy(update={"data": data}).to_yaml())
    report = Page(write_report(hostile))
    report.check_self_contained()
    assert len(report.pictures()) == 7
    assert report.text.count(hostile.name) == 2
    assert report.text.count(HOSTILE) > 4
    assert HOSTILE not in (hostile / "report.html").read_text()


def test_names_with_invalid_utf8_are_replaced(run: Path) -> None:
    change(run / "samples" / "manifest.json", lambda manifest: manifest.update(class_names=["caf\udce9"] * 10))
    assert "caf?" in Page(write_report(run)).text


def test_report_of_a_new_run_names_missing_parts(run: Path) -> None:
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    report = Page(write_report(run))
    report.check_self_contained()
    assert tuple(report.headings) == SECTIONS
    assert report.pictures() == []
    assert report.text.count("not started") == 6
    for words in (
        "This run is not finished",
        "No image yet: sampled images",
        "No validation of the autoencoder",
        "No validation of a prior",
        "Not evaluated",
        "No stage is finished",
        "Digests and versions",
    ):
        assert words in report.text


def test_report_of_a_running_run_shows_progress(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "prior-bottom" / "model.safetensors").unlink()
    (run / "prior-bottom" / "summary.json").unlink()
    history = run / "prior-bottom" / "metrics.jsonl"
    entry = {"step": 2, "validation/nll": 2.0, "validation/bits": 2.885, "validation/uniform": 2.77}
    history.write_text(json.dumps(entry | {"validation/unigram": 2.5}) + "\n" + '{"step": 3, "tra')
    (run / "samples" / "images" / "000004.png").unlink()
    text = Page(write_report(run)).text
    assert "prior-bottom in progress step 2 of 4" in text
    assert "samples in progress 4 of 5 images" in text
    assert "bottom 8 × 8 2.000 2.885 2.770 2.500 185" in text
    history.unlink()
    text = Page(write_report(run)).text
    assert "prior-bottom not started" in text
    assert "bottom 8 × 8 – – – – –" in text
    assert "total 80 codes –" in text


def test_samples_option_shows_another_folder(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert main(["sample", str(run), "--count", "2", "--seed", "9", "--out", str(other)]) == 0
    assert main(["report", str(run), "--samples", str(other)]) == 0
    text = Page(run / "report.html").text
    assert "2 images; seed 9" in text
    assert "The metrics were measured on other samples" in text


def test_newest_samples_of_the_present_networks_are_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "prior-top" / "model.safetensors"
    checkpoint.save(path, *changed(path))
    for seed in ("5", "6"):
        assert main(["sample", str(run), "--count", "2", "--seed", seed]) == 0
    change(run / "samples-3" / "manifest.json", lambda manifest: manifest.update(priors=["0" * 64] * 2))
    text = Page(write_report(run)).text
    assert "2 images; seed 5" in text, "samples and samples-3 are of other networks"
    assert "Made with another" not in text
    assert main(["evaluate", str(run), "--features", "efficientnet-lite0"]) == 0
    assert "2 samples of 32×32 pixels (seed 5)" in capsys.readouterr().out


def test_folder_without_samples_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(run)
    before = (run / "report.html").read_bytes()
    for folder in (tmp_path / "nowhere", run / "autoencoder"):
        fails(capsys, ["report", str(run), "--samples", str(folder)], f"--samples {folder}: no manifest.json", "Give")
    assert (run / "report.html").read_bytes() == before


def test_load_picture_downscales_wide_images(tmp_path: Path) -> None:
    Image.new("RGB", (4224, 100)).save(tmp_path / "wide.png")
    picture = load_picture(tmp_path / "wide.png", "wide")
    assert (picture.width, picture.height, picture.pixelated) == (2112, 50, False)
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as image:
        assert image.size == (2112, 50)


def test_format_duration_uses_two_units() -> None:
    shown = [format_duration(seconds) for seconds in (0.04, 9.96, 59.7, 206, 3599.6, 90000)]
    assert shown == ["0.0 s", "10 s", "1 min 0 s", "3 min 26 s", "1 h 0 min", "25 h 0 min"]


def test_invalid_runs_give_one_line_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere: not a run folder" in error
    grid = run / "samples" / "grid.png"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\x02\0\0\0"
    for content in (b"no picture", grid.read_bytes()[:200], bomb + zlib.crc32(bomb[12:]).to_bytes(4, "big")):
        grid.write_bytes(content)
        with pytest.raises(UserError, match=r"grid\.png: not a readable image"):
            write_report(run)
    (run / "autoencoder" / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: not valid JSON"):
        write_report(run)
    (run / "config.yaml").write_text("data: {size: 32}\n")
    with pytest.raises(UserError, match=r"config\.yaml: truncated"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("width", [1200, 400])
def test_browser_shows_every_image(run: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    colors = paint_pictures(run)
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", f"--window-size={width},6000"]
    url = write_report(run).resolve().as_uri()
    subprocess.run([*command, "--hide-scrollbars", url], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.array(image.convert("RGB")).astype(int)
    assert pixels.shape == (6000, width, 3)
    for color in colors:
        found = np.abs(pixels - color).max(2) < 4
        rows, columns = np.nonzero(found.any(1))[0], np.nonzero(found.any(0))[0]
        assert found.sum() > 1000
        # A single rectangle inside the page.
        assert found.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0 < columns[0] < columns[-1] < width - 1
    assert pixels.std() > 20
    assert (pixels[:, -8:] == 255).all()  # no horizontal overflow


def paint_pictures(run: Path) -> np.ndarray:
    """Replace every image of the report by a distinct solid color, and return the colors (N, 3)."""
    shown = [run / "samples" / "grid.png"]
    for stage in ("autoencoder", "prior-top", "prior-bottom"):
        shown += [max((run / stage / "previews").glob("*.png")), run / stage / "curves.png"]
    bright, dark = 230, 30  # no grays, since antialiased text contains them
    colors = np.array(
        [
            *((bright, dark, dark), (dark, bright, dark), (dark, dark, bright), (bright, bright, dark)),
            *((bright, dark, bright), (dark, bright, bright), (bright, 130, dark)),
        ]
    )
    for path, color in zip(shown, colors, strict=True):
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, tuple(color.tolist())).save(path)
    return colors


def test_report_loads_no_external_resources(run: Path) -> None:
    text = write_report(run).read_text()
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert not re.search(r"@import|url\(", text)


RECORDS = ("samples/manifest.json", "evaluation/metrics.json", "autoencoder/summary.json", "diagnosis/diagnosis.json")


@pytest.mark.parametrize("name", [*RECORDS, "prior-top/summary.json", "codes/summary.json", "samples/summary.json"])
def test_json_of_another_shape_gives_one_line_errors(run: Path, name: str) -> None:
    path = run / name
    if "diagnosis" in name:
        diagnose_run(run, 2)
    original = json.loads(path.read_text())
    values = [{}, [], "text", 5, None, True, math.nan]
    for key in original:
        values += [original | {key: changed} for changed in ("x", -1, math.nan, [-1], {"x": 1}, 10**40)]
        values.append({other: value for other, value in original.items() if other != key})
    messages = []
    for value in values:
        path.write_text(json.dumps(value))
        try:
            write_report(run)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) >= 7
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
    path.write_text("{}")
    with pytest.raises(UserError, match=f"{name}: .*required, but missing.*elete"):
        write_report(run)


def test_labels_out_of_range_and_unknown_rows_are_refused(run: Path) -> None:
    diagnose_run(run, 2)
    for name, changes, words in (
        ("samples/manifest.json", {"labels": [0, 1, 2, 3, 99]}, "the label 99 is not one of 10 classes"),
        ("samples/manifest.json", {"labels": [0]}, "1 labels for 5 images"),
        ("diagnosis/diagnosis.json", {"rows": ["true-middle"]}, "'true-middle' is not a row of this run"),
    ):
        original = (run / name).read_text()
        change(run / name, lambda value, changes=changes: value.update(changes))
        with pytest.raises(UserError, match=words):
            write_report(run)
        (run / name).write_text(original)


def test_missing_metrics_are_shown_with_the_reason(run: Path) -> None:
    missing = {"missing": "needs more images"}
    change(run / "evaluation" / "metrics.json", lambda metrics: metrics.update(fid=missing, kid=missing, cas=missing))
    (run / "autoencoder" / "summary.json").unlink()
    (run / "autoencoder" / "metrics.jsonl").write_text('{"step": 3, "validation/psnr": 9.5}\n')
    report = Page(write_report(run))
    report.check_self_contained()
    assert report.text.count("not measured: needs more images") == 3
    assert "9.50" in report.text
