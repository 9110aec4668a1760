"""Tests for classifiers: torchvision models, own weights files, and labeled samples."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from sampling.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    LabeledSamples,
    load_classifier,
    save_classifier,
)
from vqvae2.errors import UserError

NAME = "squeezenet1_1"
WEIGHTS = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
IMAGES = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cached_weights(home: Path) -> Path:
    """Return the path where torch.hub caches the weights of NAME if TORCH_HOME is `home`."""
    path = home / "hub" / "checkpoints" / Path(WEIGHTS.url).name
    path.parent.mkdir(parents=True)
    return path


def test_torchvision_classifier_matches_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    peer = torchvision.models.get_model(NAME, weights=None).eval()
    torch.save(peer.state_dict(), cached_weights(tmp_path))
    classifier = load_classifier(NAME)
    found = classifier.log_probs(IMAGES)
    transform = WEIGHTS.transforms()
    with torch.inference_mode():
        expected = torch.cat([peer(transform(image)[None]) for image in IMAGES]).log_softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert classifier.class_indices([f"n{index:08d}" for index in range(1000)]) == list(range(1000))
    with pytest.raises(UserError, match=rf"--classifier {NAME}: this model has 1000 classes, but the run has 10"):
        classifier.class_indices(["a"] * 10)


def test_missing_weights_error_names_url_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(
        UserError, match=r"cannot download the weights of \w+ \(no network\). Put https://.*pth at .*safetensors"
    ):
        load_classifier(NAME)


def test_pickled_code_in_weights_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # pyright: ignore[reportReturnType]

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = cached_weights(tmp_path)
    torch.save({"weight": Program()}, path)
    with pytest.raises(UserError, match="cannot download the weights"):
        load_classifier(NAME)
    path.write_bytes(pickle.dumps(Program(), protocol=2))
    with pytest.raises(UserError, match="cannot download the weights"):
        load_classifier(NAME)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [(16, 24), (72, 72)])
def test_save_and_load_classifier_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    spec = ClassifierConfig(architecture="resnet18", classes=("cat", "dog", "owl"), size=size)
    network = spec.build()
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, network, spec, {"samples": "…"})
    loaded = load_classifier(str(path))
    expected = Classifier.from_network(network, spec, "").log_probs(IMAGES)
    assert torch.equal(loaded.log_probs(IMAGES), expected)
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(3))
    assert loaded.class_indices(["owl", "cat"]) == [2, 0]
    with pytest.raises(UserError, match="the run's class 'emu' is missing"):
        loaded.class_indices(["cat", "emu"])


def test_stem_does_not_downsample_small_images() -> None:
    for side, expected in ((64, 64), (65, 17)):
        network = ClassifierConfig(architecture="resnet18", classes=("a", "b"), size=(side, side)).build()
        stem = torch.nn.Sequential(*list(network.children())[:4])
        assert stem(torch.zeros(1, 3, side, side)).shape == (1, 64, expected, expected)


def test_damaged_files_give_one_line_errors(tmp_path: Path) -> None:
    spec = ClassifierConfig(architecture="resnet18", classes=("a", "b"), size=(16, 16))
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, spec.build(), spec.model_copy(update={"classes": ("a", "b", "c")}), {})
    with pytest.raises(UserError, match=r"fc.weight. has shape \(2, 512\)"):
        load_classifier(str(path))
    save_classifier(path, spec.build(), spec.model_copy(update={"architecture": "resnet7"}), {})
    with pytest.raises(UserError, match="architecture"):
        load_classifier(str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="corrupted weights file"):
        load_classifier(str(path))


def test_preprocessing_is_independent_per_image() -> None:
    def preprocess(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    classifier = Classifier(torch.nn.Linear(3, 5).eval(), preprocess, tuple("abcde"), "test", "")
    whole = classifier.log_probs(IMAGES)
    torch.testing.assert_close(whole[1:2], classifier.log_probs(IMAGES[1:2]))


def test_labeled_samples_read_labels_from_manifest(finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run / "samples", tmp_path / "samples")
    samples = LabeledSamples(folder)
    assert [samples[number].label for number in range(5)] == list(samples.labels) == [0, 1, 2, 3, 4]
    assert samples[2].image.shape == (3, 32, 32)
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(folder / "images" / "000004.png")
    assert samples[4].image[:, 0, 0].tolist() == [200, 0, 0], "alpha is ignored, as in held-out images"
    (folder / "images" / "000003.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images are missing, the first is 000003\.png"):
        LabeledSamples(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"labels": None}))
    with pytest.raises(UserError, match="samples have no labels"):
        LabeledSamples(folder)
