"""Tests for `vqvae2 diagnose`: diagnostic rows, training warnings, and their place in the report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sampling.evaluation.diagnose import diagnose_run, diagnostic_rows
from sampling.evaluation.training_checks import codebook_warnings, prior_warnings
from sampling.masks import keep_coarsest
from sampling.params import SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.report.report import write_report
from tests.test_commands import contents, fails
from tests.test_priors import build
from tests.test_report import Page
from vqvae2.__main__ import main
from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch, CodeStore
from vqvae2.data.images import to_uint8
from vqvae2.models import AutoencoderConfig, LevelConfig
from vqvae2.quantizers import EMAConfig


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def log(nll: list[float], loss: list[float]) -> list[dict[str, float]]:
    """Return a metric log that alternates training and validation entries."""
    entries: list[dict[str, float]] = []
    for step, (validation, training) in enumerate(zip(nll, loss, strict=True), 1):
        entries += [{"step": step, "train/loss": training}, {"step": step, "validation/nll": validation}]
    return entries


def test_codebook_warnings_report_collapsed_levels() -> None:
    validation = {"perplexity_bottom": 60.0, "perplexity_top": 1.99, "psnr": 20.0}
    (warning,) = codebook_warnings(validation, ("bottom", "top"))
    assert warning.startswith("level top: codebook has collapsed (perplexity 1.99")
    (warning,) = codebook_warnings({"perplexity_top": 16.0, "same_codes_top": 1.0}, ("bottom", "top"))
    assert "level top: codebook has collapsed (held-out images have 100.0% of their codes in common)" in warning
    validation = {"perplexity_top": 2.0, "same_codes_top": 0.5}
    assert codebook_warnings(validation, ("bottom", "top")) == codebook_warnings({}, ("top",)) == []


def test_prior_of_constant_codes_starts_with_a_warning(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "prior-top" / "model.safetensors").unlink()
    monkeypatch.setattr("train.stages.prior.train", lambda *_: None)
    command, read = ["train-prior", str(run / "config.yaml"), "--level", "top"], CodeStore.read
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().out

    def constant(self: CodeStore, indices: Sequence[int]) -> CodeBatch:
        batch = read(self, indices)
        return batch._replace(codes=tuple(level.fill_(3) for level in batch.codes))

    monkeypatch.setattr(CodeStore, "read", constant)
    assert main(command) == 0
    warning = "warning: level top: codebook has collapsed (all training codes are equal)"
    assert warning in capsys.readouterr().out


def test_prior_warnings_report_overfitting_and_deterministic_codes() -> None:
    assert prior_warnings("top", []) == prior_warnings("top", [{"step": 1, "train/loss": 2.0}]) == []
    (known,) = prior_warnings("top", log([0.3, 0.04], [0.3, 0.1]))
    assert "level top" in known
    assert "0.040 nats" in known
    (overfits,) = prior_warnings("bottom", log([3.0, 2.5, 2.7, 2.9], [3.0, 2.4, 2.0, 1.5]))
    assert "level bottom: prior overfits" in overfits
    assert "2.900 nats per code at the end, 2.500 at step 2" in overfits
    assert prior_warnings("bottom", log([3.0, 2.5, 2.7, 2.9], [3.0, 2.4, 2.0, 1.5]), keeps_best=True) == []
    assert prior_warnings("top", log([3.0, 2.5, 2.54], [3.0, 2.4, 2.0])) == []  # less than 2 % worse
    assert prior_warnings("top", log([3.0, 2.5, 2.9], [2.0, 2.4, 2.6])) == []  # training loss increases, too
    assert prior_warnings("top", log([3.0, 2.5, 2.4], [3.0, 2.4, 2.0])) == []


def test_each_row_samples_one_more_level(finished_run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    batch = CodeStore.open(finished_run / "codes" / "val").read(range(4, 7))
    found = diagnostic_rows(pipeline, batch.codes, batch.label, seed=3, first=4)
    assert list(found) == ["reconstruction", "true-top", "sampled"]

    def image(codes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return to_uint8(pipeline.autoencoder.decode(codes))

    sampled = pipeline.sample_codes(range(4, 7), batch.label, 3, SamplingParams())
    known = keep_coarsest(batch.codes, 1)
    true_top = pipeline.sample_codes(range(4, 7), batch.label, 3, SamplingParams(), known)
    assert torch.equal(true_top[1], batch.codes[1])
    assert not torch.equal(true_top[0], batch.codes[0])
    for name, codes in (("reconstruction", batch.codes), ("true-top", true_top), ("sampled", sampled)):
        assert torch.equal(found[name], image(codes))


def test_three_levels_give_four_rows() -> None:
    torch.manual_seed(0)
    levels = tuple(
        LevelConfig(stride=2, quantizer=EMAConfig(codebook_size=11 + index, code_dim=4)) for index in range(3)
    )
    autoencoder = AutoencoderConfig(levels=levels, channels=8, residual_channels=4).build((16, 16)).eval()
    sizes = ((8, 8), (4, 4), (2, 2))
    priors = tuple(build(sizes[level], sizes[level + 1 :], kind="pixelcnn") for level in range(2))
    top = build(sizes[2], kind="pixelcnn").config.build(build(sizes[2], kind="pixelcnn").spec).eval()
    spec = MapSpec(codebook_size=11, height=2, width=2)
    assert top.spec.level == spec
    pipeline = VQVAE2Pipeline(autoencoder, (*priors, top))
    codes = tuple(torch.randint(11, (2, *size)) for size in sizes)
    assert list(diagnostic_rows(pipeline, codes, None, 0)) == ["reconstruction", "true-middle", "true-top", "sampled"]


def test_diagnose_command_writes_images_once_and_report_shows_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Not diagnosed yet" in Page(write_report(run)).text
    assert main(["diagnose", str(run), "--count", "10"]) == 0
    folder = run / "diagnosis"
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(folder / "diagnosis.png"), "rows: reconstruction, true-top, sampled"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("diagnosis.json", "diagnosis.png", "reconstruction.png", "sampled.png", "true-top.png")
    ]
    with Image.open(folder / "diagnosis.png") as shown, Image.open(folder / "sampled.png") as sampled:
        assert shown.size == (8 * 98 + 2, 3 * 98 + 2)
        assert sampled.size == (8 * 98 + 2, 2 * 98 + 2)
        rows_of = [np.array(shown)[2 + 98 * row : 98 + 98 * row] for row in range(3)]
        assert np.array_equal(rows_of[2], np.array(sampled)[2:98])
    assert not np.array_equal(rows_of[0], rows_of[1])
    report = Page(write_report(run))
    report.check_self_contained()
    assert len(report.pictures()) == 8
    rows_caption = "all codes from the encoder; codes from the encoder down to the top level, finer codes sampled"
    assert f"{rows_caption}; all codes sampled" in report.text
    before = contents(run)
    assert diagnose_run(run, 10) == folder
    assert contents(run) == before
    diagnose_run(run, 10, seed=1)
    after = contents(folder)
    assert after["reconstruction.png"] == before["diagnosis/reconstruction.png"]
    assert after["true-top.png"] != before["diagnosis/true-top.png"]
    assert json.loads(after["diagnosis.json"])["seed"] == 1


def test_warnings_are_printed_and_shown_in_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = run / "prior-top" / "metrics.jsonl"
    history.write_text("".join(json.dumps(entry) + "\n" for entry in log([3.0, 2.5, 2.9], [3.0, 2.4, 2.0])))
    summary = run / "autoencoder" / "summary.json"
    value = json.loads(summary.read_text())
    value["validation"]["perplexity_bottom"] = 1.25
    summary.write_text(json.dumps(value))
    assert main(["diagnose", str(run), "--count", "2"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert ["bottom: codebook has collapsed" in line for line in warnings].count(True) == 1
    assert ["top: prior overfits" in line for line in warnings].count(True) == 1
    text = Page(write_report(run)).text
    assert "perplexity 1.25 on held-out images" in text
    assert "Level top: prior overfits" in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["priors"]["top"]["training"]["early_stopping_patience"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config) + "# complete\n")
    summary = run / "prior-top" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"steps": 2}))
    text = Page(write_report(run)).text
    assert "Level top: prior overfits" not in text, "the best weights are kept"
    assert "2 steps" in text


def test_invalid_runs_give_one_line_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["diagnose", str(run), "--count", "0"], "--count", "greater than or equal to 1")
    shutil.rmtree(run / "codes" / "val")
    fails(capsys, ["diagnose", str(run)], "codes/val", "no code store")
    assert not (run / "diagnosis").exists()
