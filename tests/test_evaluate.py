"""Tests for the evaluation of a run: reference sets, protocol, warnings, and several processes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.evaluation.evaluate import EvaluationConfig, evaluate_run
from sampling.evaluation.features import FeatureSummary, KeepOptions, _load_if_valid, summarize_features
from sampling.evaluation.format_metrics import _metric, format_metrics
from sampling.evaluation.image_sets import ImageFolder
from sampling.evaluation.metrics import read_metrics
from sampling.run_config import RunConfig
from tests.inception_fixture import extractor, fill, two_processes
from vqvae2 import checkpoint, files
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.inception import WeightsUnavailableError
from vqvae2.metrics.inception_score import InceptionScoreResult
from vqvae2.models import Autoencoder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def evaluate(run: Path, weights: Path, **settings: Any) -> dict[str, Any]:
    config = EvaluationConfig(inception_weights=str(weights), batch_size=7, **settings)
    return evaluate_run(run, config, run / "samples")


def test_validation_reference_uses_transformed_images(run: Path, inception_weights: Path) -> None:
    metrics = evaluate(run, inception_weights)
    _, held_out = open_datasets(RunConfig.from_resolved_yaml(run / "config.yaml").data)
    reference = GaussianStatistics(2048)
    reference.update(extractor()(torch.stack([held_out[index].image for index in range(len(held_out))])).features)
    folder = ImageFolder(run / "samples" / "images")
    ours = summarize_features(folder.batches(50), len(folder), extractor()).statistics
    assert metrics["fid"]["value"] == pytest.approx(ours.distance(reference), rel=1e-5)
    assert metrics["rfid"]["value"] > 0
    assert metrics["protocol"]["reference"] == {
        "name": "validation",
        "split": "validation",
        "count": len(held_out),
        "size": (32, 32),
        "formats": {"png": len(held_out)},
    }
    assert metrics["warnings"] == []


def test_metrics_json_contains_the_protocol(run: Path, inception_weights: Path) -> None:
    evaluate(run, inception_weights)
    metrics = files.read_json(run / "evaluation" / "metrics.json")
    protocol = metrics["protocol"]
    assert protocol["samples"]["count"] == 5
    assert protocol["samples"]["seed"] == 0
    assert protocol["samples"]["sampling_params"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert protocol["inception_weights"] == files.digest(inception_weights)
    assert protocol["standard_weights"] is False
    assert {"torch", "torchvision", "pytorch-fid", "scipy", "pillow"} == protocol["versions"].keys()
    assert metrics["reconstruction"].keys() == {"mse", "psnr", "ssim"}
    assert metrics["likelihood"]["top"].keys() >= {"nll", "bits", "uniform", "unigram"}
    levels = metrics["likelihood"]
    bits = 64 * levels["bottom"]["nll"] / np.log(2) + 16 * levels["top"]["nll"] / np.log(2)
    assert metrics["bits_per_image"] == pytest.approx(bits)
    assert metrics["bits_per_dimension"] == pytest.approx(bits / (3 * 32 * 32))
    text = format_metrics(metrics)
    assert "too few images for a comparable FID" in text
    assert text.index("KID") < text.index("FID  "), "KID is unbiased and comes first if there are few images"
    assert "NOT the standard Inception weights" in text


def test_folder_and_its_statistics_agree_and_folder_features_are_cached(
    run: Path, inception_weights: Path, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "reference", 9, size=(32, 32))
    first = evaluate(run, inception_weights, reference=str(folder))
    cached = list((run / "evaluation").glob("*.npz"))
    assert len(cached) == 1
    images = ImageFolder(folder)
    statistics = tmp_path / "reference.npz"
    summarize_features(images.batches(50), len(images), extractor()).statistics.save(statistics)
    second = evaluate(run, inception_weights, reference=str(statistics))
    assert second["fid"]["value"] == pytest.approx(first["fid"]["value"], rel=1e-6)
    assert "kid" in first
    assert "no features" in second["kid"]["missing"], "statistics files contain no features"

    for path in folder.iterdir():
        content = path.stat()
        path.write_bytes(b"x" * content.st_size)  # same size and modification time, so the cache stays valid
        os.utime(path, ns=(content.st_atime_ns, content.st_mtime_ns))
    again = evaluate(run, inception_weights, reference=str(folder))
    assert again["fid"]["value"] == first["fid"]["value"]


def test_replaced_weights_file_is_measured_again(run: Path, inception_weights: Path, tmp_path: Path) -> None:
    weights = tmp_path / "inception.pth"
    shutil.copy(inception_weights, weights)
    first = evaluate(run, weights)
    state = torch.load(weights, weights_only=True)
    torch.save({name: 1.5 * each if each.is_floating_point() else each for name, each in state.items()}, weights)
    second = evaluate(run, weights)
    assert second["protocol"]["inception_weights"] == files.digest(weights)
    assert second["fid"]["value"] != first["fid"]["value"]


def test_different_sizes_and_formats_give_warnings(run: Path, inception_weights: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "reference", 6, size=(48, 40))
    for path in list(folder.iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    metrics = evaluate(run, inception_weights, reference=str(folder))
    size, image_format = metrics["warnings"]
    assert "samples are 32×32 pixels and the reference is 40×48" in size
    assert "samples are png and the reference is jpg" in image_format
    assert format_metrics(metrics).count("warning ") == 2


def test_interrupted_evaluation_leaves_no_partial_files(
    run: Path, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "reference", 6, size=(32, 32))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, inception_weights, reference=str(folder))
    assert [path for path in (run / "evaluation").rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    assert evaluate(run, inception_weights, reference=str(folder))["fid"]["value"] > 0


def test_two_processes_match_one(run: Path, inception_weights: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    one = evaluate(run, inception_weights)
    for two in two_processes(evaluate, other, inception_weights):
        assert two["fid"]["value"] == pytest.approx(one["fid"]["value"], rel=1e-6)
        assert two["kid"]["mean"] == pytest.approx(one["kid"]["mean"], rel=1e-4, abs=1e-6)
        assert two["inception_score"]["mean"] == pytest.approx(one["inception_score"]["mean"], rel=1e-6)


def test_invalid_references_give_one_line_errors(run: Path, inception_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", means=np.zeros(3))
    for name in ("missing", "empty", "damaged.npz", "other.npz"):
        with pytest.raises(UserError, match=name) as error:
            evaluate(run, inception_weights, reference=str(tmp_path / name))
        assert "\n" not in str(error.value)
    shutil.rmtree(run / "samples")
    with pytest.raises(UserError, match=r"no samples found\. Create them with `vqvae2 sample"):
        evaluate(run, inception_weights)


def test_metrics_of_a_collapsed_level_are_formatted() -> None:
    prior = {"nll": 0.01, "uniform": 2.77, "unigram": 0.0}
    metrics = {
        "reconstruction": {"psnr": 20.0, "ssim": 0.5},
        "codes": {"top": {"usage": 0.1, "perplexity": 1.0}},
        "likelihood": {"top": prior},
        "bits_per_image": 0.1,
        "bits_per_dimension": 0.001,
        "fid": {"missing": "no Inception weights"},
    }
    assert "NLL 0.010 nats per code (uniform 2.770, unigram 0.000)" in format_metrics(metrics)


def test_long_names_are_separated_from_their_values() -> None:
    assert _metric("efficientnet-lite2", {"missing": "no weights"}, str) == "efficientnet-lite2 -  (no weights)"


def test_one_sample_gives_a_reason_for_each_missing_metric(run: Path, inception_weights: Path) -> None:
    manifest = files.read_json(run / "samples" / "manifest.json")
    files.write_json(run / "samples" / "manifest.json", manifest | {"count": 1, "labels": [0]})
    for number in range(1, 5):
        (run / "samples" / "images" / f"{number:06d}.png").unlink()
    metrics = evaluate(run, inception_weights)
    assert "at least 2 images, got 1" in metrics["fid"]["missing"]
    assert "at least 2 images per side, got 1" in metrics["kid"]["missing"]
    assert "more than 5 images per side, got 1" in metrics["precision_recall"]["missing"]
    assert metrics["rfid"]["value"] > 0
    assert metrics["inception_score"]["mean"] == pytest.approx(1)
    assert "FID              -  (a covariance needs at least 2 images, got 1)" in format_metrics(metrics)
    assert read_metrics(run / "evaluation" / "metrics.json") == json.loads(json.dumps(metrics))


def test_missing_summaries_do_not_prevent_the_other_metrics(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise WeightsUnavailableError("no Inception weights")

    monkeypatch.setattr("vqvae2.metrics.pretrained_features.load_inception", unavailable)
    (run / "autoencoder" / "summary.json").unlink()
    summary = files.read_json(run / "prior-top" / "summary.json")
    files.write_json(run / "prior-top" / "summary.json", summary | {"validation": {"nll": 2.0}})
    metrics = evaluate(run, run / "missing.pth")
    assert "summary.json: no such file" in metrics["reconstruction"]["missing"]
    assert "summary.json: no such file" in metrics["codes"]["top"]["missing"]
    assert "no bits, uniform, unigram" in metrics["likelihood"]["top"]["missing"]
    assert metrics["likelihood"]["bottom"]["nll"] > 0
    assert "missing" in metrics["bits_per_image"]
    text = format_metrics(metrics)
    assert "reconstruction   -  (" in text
    assert "FID              -  (no Inception weights)" in text


def test_autoencoder_of_another_config_is_refused(run: Path, inception_weights: Path) -> None:
    stored = Autoencoder.load(run / "autoencoder" / "model.safetensors")
    for size, channels in (((64, 64), 3), ((32, 32), 1)):
        stored.config.build(size, channels).save(run / "autoencoder" / "model.safetensors")
        manifest = json.loads((run / "samples" / "manifest.json").read_text())
        digest = files.digest(run / "autoencoder" / "model.safetensors")
        files.write_json(run / "samples" / "manifest.json", manifest | {"autoencoder": digest})
        with pytest.raises(UserError, match=r"model\.safetensors: an autoencoder of images .* but .* describes 32×32"):
            evaluate(run, inception_weights)


@pytest.mark.parametrize("stage", ["autoencoder", "prior-top", "prior-bottom"])
def test_samples_of_other_networks_are_refused(run: Path, inception_weights: Path, stage: str) -> None:
    path = run / stage / "model.safetensors"
    tensors, metadata = checkpoint.load(path)
    checkpoint.save(path, tensors, metadata | {"made_from": {"data": "another"}})
    with pytest.raises(UserError, match=rf"samples: made with another {stage} than the one in .*vqvae2 sample"):
        evaluate(run, inception_weights)
    path.unlink()
    if stage != "autoencoder":  # a deleted prior is not compared
        assert "value" in evaluate(run, inception_weights)["fid"]


@pytest.mark.parametrize(
    "changes",
    [
        {"n": np.int64(10**18)},
        {"features": np.full((9, 2048), np.nan, np.float32)},
        {"features": np.zeros((1, 2048), np.float32)},
        {"score": np.array(["a", "b"])},
        {"size": np.array([np.nan, 1])},
        {"size": np.array([-1, -1])},
    ],
)
def test_invalid_feature_cache_is_computed_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    keep = KeepOptions(features=9)
    first = FeatureSummary(GaussianStatistics(2048), torch.ones(9, 2048), InceptionScoreResult(1.0, 0.0), (32, 32))
    first.statistics.update(torch.rand(9, 2048))
    first.save(tmp_path / "cache.npz")
    assert _load_if_valid(tmp_path / "cache.npz", 9, keep) is not None
    np.savez(tmp_path / "cache.npz", **(dict(np.load(tmp_path / "cache.npz")) | changes))
    assert _load_if_valid(tmp_path / "cache.npz", 9, keep) is None
