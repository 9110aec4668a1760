"""Tests for the classification accuracy score: training, accuracy, augmentation and the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sampling.evaluation.cas import AugmentedDataset, CasConfig, top_k_accuracy, train_classifier
from sampling.evaluation.classifier import Classifier, ClassifierConfig, LabeledSamples, load_classifier
from sampling.evaluation.format_metrics import format_cas
from tests.test_commands import contents, fails
from vqvae2.__main__ import main
from vqvae2.data.images import ImageSample, to_rgb
from vqvae2.data.scenes import CLASSES

COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40], [40, 200, 200], [200, 40, 200]])
SPEC = ClassifierConfig(architecture="resnet18", classes=tuple("abcdef"), size=(8, 8))
TRAINING = CasConfig(steps=30, batch_size=16)


class ColoredImages:
    """Noisy images of a single color each; the label is the color, or random if `shuffled`."""

    def __init__(self, count: int, seed: int, shuffled: bool = False) -> None:
        rng = np.random.default_rng(seed)
        colors = np.arange(count) % len(COLORS)
        noise = rng.normal(0, 25, (count, 3, 8, 8))
        self.pixels = np.clip(COLORS[colors][:, :, None, None] + noise, 0, 255).astype(np.uint8)
        self.labels = rng.permutation(colors) if shuffled else colors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> ImageSample:
        return ImageSample(torch.from_numpy(self.pixels[index]), int(self.labels[index]))


def test_train_classifier_learns_and_is_deterministic() -> None:
    network = train_classifier(ColoredImages(96, seed=0), SPEC, TRAINING)
    found = top_k_accuracy(Classifier.from_network(network, SPEC, ""), ColoredImages(120, seed=1), batch_size=50)
    assert found["top1"] > 0.9
    assert found["top5"] >= found["top1"]
    assert not network.training
    short = TRAINING.model_copy(update={"steps": 2})
    state = torch.random.get_rng_state()
    first, again = (train_classifier(ColoredImages(96, seed=0), SPEC, short).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = train_classifier(ColoredImages(96, seed=0), SPEC, short.model_copy(update={"seed": 1})).state_dict()
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_shuffled_labels_give_chance_accuracy() -> None:
    network = train_classifier(ColoredImages(96, seed=0, shuffled=True), SPEC, TRAINING)
    held_out = ColoredImages(120, seed=1, shuffled=True)
    assert top_k_accuracy(Classifier.from_network(network, SPEC, ""), held_out, batch_size=50)["top1"] < 0.3


def test_top_k_accuracy_matches_numpy() -> None:
    classifier = Classifier.from_network(SPEC.build(), SPEC, "")
    images = ColoredImages(20, seed=0)
    order = classifier.log_probs(torch.from_numpy(images.pixels)).argsort(1, descending=True).numpy()
    found = top_k_accuracy(classifier, images, batch_size=7)
    assert found == {
        "top1": float(np.mean(order[:, 0] == images.labels)),
        "top5": float(np.mean((order[:, :5] == images.labels[:, None]).any(1))),
    }
    five = ClassifierConfig(architecture="resnet18", classes=tuple("abcde"), size=(8, 8))
    assert set(top_k_accuracy(Classifier.from_network(five.build(), five, ""), images, batch_size=7)) == {"top1"}


def test_augmentation_shifts_and_flips_depending_on_draw_only() -> None:
    picture = torch.arange(3 * 16 * 16, dtype=torch.int64).view(3, 16, 16).remainder(251).to(torch.uint8)
    augmented = AugmentedDataset([ImageSample(picture, 4)])  # pyright: ignore[reportArgumentType]
    found = [augmented[0, draw] for draw in range(40)]
    assert all(item.label == 4 and item.image.shape == picture.shape for item in found)
    assert torch.equal(found[7].image, augmented[0, 7].image)
    padded = torch.from_numpy(np.pad(picture.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect"))
    crops = [padded[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    kinds = {
        (place, mirrored)
        for item in found
        for place, crop in enumerate(crops)
        for mirrored in (False, True)
        if torch.equal(item.image, crop.flip(2) if mirrored else crop)
    }
    assert len(kinds) > 15
    assert {mirrored for _, mirrored in kinds} == {False, True}


def test_to_rgb_converts_gray_and_rgba() -> None:
    assert to_rgb(torch.full((2, 1, 4, 4), 9, dtype=torch.uint8)).shape == (2, 3, 4, 4)
    assert to_rgb(torch.zeros(2, 4, 4, 4, dtype=torch.uint8)).shape == (2, 3, 4, 4)


def test_evaluate_command_reports_cas_and_reuses_classifiers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    run = shutil.copytree(finished_run, tmp_path / "run")
    command = ["evaluate", str(run), "--cas.enabled", "--cas.real", "--cas.steps", "2", "--cas.batch-size", "4"]
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "evaluation" / "metrics.json").read_text())["cas"]
    assert found["trained_on"] == found["real"]["trained_on"] == 5
    assert found["tested_on"] == found["real"]["tested_on"] > 5
    assert 0 <= found["top1"] <= found["top5"] <= 1
    assert (found["model"], found["steps"], found["batch_size"], found["seed"]) == ("resnet18", 2, 4, 0)
    assert found["warning"] == "too few samples for a comparable score: 5 (0 per class)"
    assert found["warning"] in printed
    assert [line for line in printed.splitlines() if line.startswith(("CAS", "recognized"))] == format_cas(found)
    assert len(format_cas(found)) == 3
    classifier = load_classifier(str(run / "evaluation" / "classifier-real.safetensors"))
    samples = LabeledSamples(run / "samples")
    images = torch.stack([samples[index].image for index in range(len(samples))])
    hits = classifier.log_probs(images).argmax(1) == torch.tensor(samples.labels)
    assert found["real"]["recognized"] == pytest.approx(float(hits.double().mean()))
    assert classifier.class_indices(CLASSES) == list(range(10))

    def run_contents() -> dict[str, object]:
        files: dict[str, object] = dict(contents(run))
        return files | {"evaluation/metrics.json": json.loads((run / "evaluation" / "metrics.json").read_text())}

    before = run_contents()
    monkeypatch.setattr("sampling.evaluation.cas.train_classifier", None)  # fails if a classifier is trained again
    assert main(command) == 0
    assert main(["evaluate", str(run)]) == 0  # the earlier score is kept
    assert "CAS" in capsys.readouterr().out
    assert run_contents() == before


def test_invalid_options_give_one_line_errors(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run)
    evaluate = ["evaluate", str(finished_run)]
    fails(capsys, [*evaluate, "--cas.steps", "5"], "--cas.steps", "--cas.enabled")
    fails(capsys, [*evaluate, "--cas.real"], "--cas.real", "--cas.enabled")
    fails(capsys, [*evaluate, "--cas.enabled", "--cas.steps", "0"], "steps", "greater than or equal to 1")
    fails(capsys, [*evaluate, "--cas.enabled", "--cas.model", "vgg16"], "model", "resnet18")
    fails(capsys, [*evaluate, "--cas.enabled", "--samples", str(tmp_path)], "no samples found")
    samples = shutil.copytree(finished_run / "samples", tmp_path / "samples")
    manifest = json.loads((samples / "manifest.json").read_text())
    (samples / "manifest.json").write_text(json.dumps(manifest | {"labels": None, "class_names": []}))
    fails(capsys, [*evaluate, "--cas.enabled", "--samples", str(samples)], str(samples), "no labels", "data.labels")
    (samples / "manifest.json").write_text(
        json.dumps(manifest | {"class_names": ["a", "b"], "labels": [0, 1, 0, 1, 0]})
    )
    fails(
        capsys,
        [*evaluate, "--cas.enabled", "--samples", str(samples)],
        "2 classes",
        "the 10 classes of the run's images",
    )
    assert contents(finished_run) == before
