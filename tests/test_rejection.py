"""Tests for classifier-based rejection: the selection of candidates and the command."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sampling.evaluation.classifier import ClassifierConfig, load_classifier, save_classifier
from sampling.evaluation.rejection import num_candidates, select_best
from sampling.pipeline import VQVAE2Pipeline
from tests.test_commands import contents, fails
from vqvae2 import AutoencoderConfig, PriorSpec
from vqvae2.__main__ import main
from vqvae2.data.images import read_image
from vqvae2.data.scenes import CLASSES
from vqvae2.models.autoencoder import LevelConfig
from vqvae2.priors import PixelCNNConfig

FRACTIONS = st.integers(1, 100).map(lambda percent: percent / 100)


@given(
    st.lists(st.tuples(st.floats(-9, 0), st.integers(0, 4)), max_size=60),
    FRACTIONS,
)
def test_select_best_keeps_the_best_fraction_of_each_label(scored: list[tuple[float, int]], fraction: float) -> None:
    scores, labels = [score for score, _ in scored], [label for _, label in scored]
    kept = select_best(scores, labels, fraction)
    exact = Fraction(str(fraction))
    assert kept == sorted(set(kept))
    assert len(kept) == (max(1, math.floor(len(labels) * exact)) if labels else 0)
    for label in set(labels):
        of_label = [index for index, found in enumerate(labels) if found == label]
        chosen = [index for index in kept if labels[index] == label]
        assert math.floor(len(of_label) * exact) <= len(chosen) <= math.ceil(len(of_label) * exact)
        best = sorted(of_label, key=lambda index: (-scores[index], index))
        assert sorted(best[: len(chosen)]) == chosen


@given(st.integers(1, 60), st.integers(1, 12), FRACTIONS)
def test_num_candidates_suffices_for_every_image_and_label(count: int, classes: int, fraction: float) -> None:
    used = min(count, classes)
    number = num_candidates(count, fraction)
    labels = [index % used for index in range(number)]
    kept = select_best([0.0] * number, labels, fraction)
    assert len(kept) == count
    assert {labels[index] for index in kept} == set(range(used))
    assert number == count or (number - 1) * Fraction(str(fraction)) < count


def test_fractions_are_exact_decimals() -> None:
    assert num_candidates(3, 0.1) == 30
    assert num_candidates(7, 0.07) == 100
    assert len(select_best([0.0] * 100, [0] * 100, 0.29)) == 29  # 100 · 0.29 is 28.999… in floating point
    assert select_best([0.1, 0.9, 0.5, 0.5], [0, 0, 0, 0], 0.5) == [1, 2]


@pytest.fixture
def classifier_path(tmp_path: Path) -> Path:
    """A weights file of a randomly initialized classifier of the built-in scenes."""
    spec = ClassifierConfig(architecture="resnet18", classes=CLASSES[::-1], size=(16, 16))
    torch.manual_seed(0)
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, spec.build(), spec, {})
    return path


def test_sample_command_keeps_the_most_probable_candidates_and_resumes(
    finished_run: Path, tmp_path: Path, classifier_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    command = [
        "sample",
        str(run),
        "--count",
        "4",
        "--classes",
        "3,7",
        "--keep-fraction",
        "0.5",
        "--classifier",
        str(classifier_path),
    ]
    capsys.readouterr()
    assert main(command) == 0
    folder = run / "samples-2"
    assert capsys.readouterr().out.splitlines()[0] == str(folder / "accepted" / "grid.png")
    assert len(list((folder / "images").iterdir())) == 8
    accepted = folder / "accepted"
    manifest = json.loads((accepted / "manifest.json").read_text())
    record = json.loads((accepted / "rejection.json").read_text())
    assert manifest["count"] == len(manifest["labels"]) == len(record["selected"]) == record["accepted"] == 4
    assert sorted(manifest["labels"]) == [3, 3, 7, 7]
    classifier = load_classifier(str(classifier_path))
    images = [torch.from_numpy(read_image(folder / "images" / f"{n:06d}.png", (32, 32))) for n in range(8)]
    probabilities = classifier.log_probs(torch.stack(images).permute(0, 3, 1, 2)).exp()
    for label in (3, 7):
        own = {n: float(probabilities[n, len(CLASSES) - 1 - label]) for n in range(8) if (3, 7)[n % 2] == label}
        chosen = {entry["candidate"]: entry["probability"] for entry in record["selected"] if entry["label"] == label}
        assert sorted(chosen) == sorted(sorted(own, key=lambda n: -own[n])[:2])
        assert chosen == pytest.approx({n: own[n] for n in chosen}, rel=1e-4)
    for entry in record["selected"]:
        copy, original = f"images/{entry['image']:06d}.png", f"images/{entry['candidate']:06d}.png"
        assert (accepted / copy).read_bytes() == (folder / original).read_bytes()
    with Image.open(accepted / "grid.png") as grid:
        assert grid.size == (2 * 98 + 2, 2 * 98 + 2)

    before = contents(run)
    (folder / "images" / "000005.png").unlink()
    shutil.rmtree(accepted)
    assert main(command) == 0
    assert contents(run) == before


def test_npz_holds_the_accepted_images_only(finished_run: Path, tmp_path: Path, classifier_path: Path) -> None:
    out = tmp_path / "samples"
    command = ["sample", str(finished_run), "--count", "4", "--format", "npz", "--out", str(out)]
    assert main([*command, "--keep-fraction", "0.5", "--classifier", str(classifier_path)]) == 0
    assert not (out / "samples.npz").exists()
    with np.load(out / "accepted" / "samples.npz") as archive:
        found = archive["arr_0"]
    accepted = sorted((out / "accepted" / "images").iterdir())
    np.testing.assert_array_equal(found, np.stack([np.asarray(Image.open(path)) for path in accepted]))
    assert len(found) == 4


def test_another_classifier_writes_to_a_new_folder(finished_run: Path, tmp_path: Path, classifier_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    command = ["sample", str(run), "--classifier", str(classifier_path)]
    assert main([*command, "--keep-fraction", "1"]) == 0
    first = contents(run / "samples" / "accepted")
    assert {name for name in first if name.endswith(".png")} == {"grid.png", "classes.png"} | {
        f"images/{n:06d}.png" for n in range(5)
    }
    other = load_classifier(str(classifier_path))
    save_classifier(
        classifier_path, other.network, ClassifierConfig(architecture="resnet18", classes=CLASSES, size=(16, 16)), {}
    )
    assert main([*command, "--keep-fraction", "1"]) == 0
    assert contents(run / "samples" / "accepted") == first
    assert (run / "samples" / "accepted-2" / "rejection.json").is_file()


def test_invalid_options_give_one_line_errors_and_write_nothing(
    finished_run: Path,
    tmp_path: Path,
    classifier_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(finished_run)
    sample = ["sample", str(finished_run)]
    fails(capsys, [*sample, "--keep-fraction", "0.5"], "--keep-fraction", "requires --classifier")
    fails(capsys, [*sample, "--classifier", str(classifier_path)], "--classifier", "requires --keep-fraction")
    for fraction in ("0", "-1", "1.5", "nan"):
        fails(
            capsys,
            [*sample, f"--keep-fraction={fraction}", "--classifier", str(classifier_path)],
            "--keep-fraction",
            fraction,
        )
    both = [*sample, "--keep-fraction", "0.5", "--classifier"]
    fails(capsys, [*both, "resnet51"], "resnet51", "neither a file", "resnet50")
    fails(capsys, [*both, str(tmp_path)], str(tmp_path), "is a folder")
    foreign = tmp_path / "weights.pth"
    foreign.write_bytes(b"pickled")
    fails(capsys, [*both, str(foreign)], "weights.pth", "only safetensors files")
    autoencoder = finished_run / "autoencoder" / "model.safetensors"
    fails(
        capsys,
        [*both, str(autoencoder)],
        "model.safetensors",
        "expected the weights of a classifier, found autoencoder",
    )
    spec = ClassifierConfig(architecture="resnet18", classes=CLASSES[1:], size=(16, 16))
    save_classifier(classifier_path, spec.build(), spec, {})
    fails(capsys, [*both, str(classifier_path)], "the run's class", CLASSES[0])
    assert contents(finished_run) == before


def test_packaged_models_can_be_sampled_with_rejection(
    tmp_path: Path, classifier_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "scenes64", "--count", "1", "--keep-fraction", "0.5", "--classifier", str(classifier_path)]
    assert main(command) == 0
    accepted = tmp_path / "scenes64-samples" / "accepted"
    assert json.loads((accepted / "rejection.json").read_text())["candidates"] == 2
    assert len(list((accepted / "images").iterdir())) == 1


def test_model_without_labels_raises(tmp_path: Path, classifier_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder = AutoencoderConfig(levels=(LevelConfig(stride=4),), channels=8, residual_channels=4).build((16, 16))
    prior = PixelCNNConfig(channels=8, layers=1, output_channels=8).build(PriorSpec(level=autoencoder.map_specs[0]))
    VQVAE2Pipeline(autoencoder, (prior,)).save_pretrained(tmp_path / "saved")
    command = ["sample", str(tmp_path / "saved"), "--keep-fraction", "0.5", "--classifier", str(classifier_path)]
    fails(capsys, command, "--keep-fraction", "no class labels")
