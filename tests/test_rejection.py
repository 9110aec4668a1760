"""Classifier-based rejection: which candidates are kept, and the command as a person types it."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sampling.evaluation.classifier import ClassifierConfig, load_classifier, save_classifier
from sampling.evaluation.rejection import num_candidates, select_best
from tests.test_commands import contents, fails
from vqvae2.__main__ import main
from vqvae2.data.images import read_image
from vqvae2.data.scenes import CLASSES

FRACTIONS = st.integers(1, 100).map(lambda percent: percent / 100)


@given(
    st.lists(st.tuples(st.floats(-9, 0), st.integers(0, 4)), max_size=60),
    FRACTIONS,
)
def test_each_label_keeps_its_best_fraction(scored: list[tuple[float, int]], fraction: float) -> None:
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
def test_there_are_candidates_for_every_image_and_every_label(count: int, classes: int, fraction: float) -> None:
    used = min(count, classes)
    number = num_candidates(count, fraction)
    labels = [index % used for index in range(number)]
    kept = select_best([0.0] * number, labels, fraction)
    assert len(kept) == count
    assert {labels[index] for index in kept} == set(range(used))
    assert number == count or (number - 1) * Fraction(str(fraction)) < count


def test_a_fraction_is_the_decimal_that_was_typed() -> None:
    assert num_candidates(3, 0.1) == 30
    assert num_candidates(7, 0.07) == 100
    assert len(select_best([0.0] * 100, [0] * 100, 0.29)) == 29  # 100 · 0.29 is 28.999… in floating point
    assert select_best([0.1, 0.9, 0.5, 0.5], [0, 0, 0, 0], 0.5) == [1, 2]


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A classifier of the built-in scenes with random weights, in a file."""
    spec = ClassifierConfig(architecture="resnet18", classes=CLASSES[::-1], size=(16, 16))
    torch.manual_seed(0)
    path = tmp_path / "judge.safetensors"
    save_classifier(path, spec.build(), spec, {})
    return path


def test_the_command_keeps_the_likeliest_and_goes_on_where_it_was_stopped(
    finished_run: Path, tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str]
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
        str(judge),
    ]
    capsys.readouterr()
    assert main(command) == 0
    folder = run / "samples-2"
    assert capsys.readouterr().out.splitlines()[0] == str(folder / "accepted" / "grid.png")
    assert len(list((folder / "images").iterdir())) == 8
    accepted = folder / "accepted"
    manifest = json.loads((accepted / "manifest.json").read_text())
    record = json.loads((accepted / "rejection.json").read_text())
    assert manifest["count"] == len(manifest["labels"]) == len(record["chosen"]) == record["accepted"] == 4
    assert sorted(manifest["labels"]) == [3, 3, 7, 7]
    classifier = load_classifier(str(judge))
    images = [torch.from_numpy(read_image(folder / "images" / f"{n:06d}.png", (32, 32))) for n in range(8)]
    sure = classifier.log_probs(torch.stack(images).permute(0, 3, 1, 2)).exp()
    for label in (3, 7):
        own = {n: float(sure[n, len(CLASSES) - 1 - label]) for n in range(8) if (3, 7)[n % 2] == label}
        chosen = {entry["candidate"]: entry["probability"] for entry in record["chosen"] if entry["label"] == label}
        assert sorted(chosen) == sorted(sorted(own, key=lambda n: -own[n])[:2])
        assert chosen == pytest.approx({n: own[n] for n in chosen}, rel=1e-4)
    for entry in record["chosen"]:
        copy, original = f"images/{entry['image']:06d}.png", f"images/{entry['candidate']:06d}.png"
        assert (accepted / copy).read_bytes() == (folder / original).read_bytes()
    with Image.open(accepted / "grid.png") as grid:
        assert grid.size == (2 * 98 + 2, 2 * 98 + 2)

    before = contents(run)
    (folder / "images" / "000005.png").unlink()
    shutil.rmtree(accepted)
    assert main(command) == 0
    assert contents(run) == before


def test_the_same_candidates_judged_otherwise_leave_the_first_choice_alone(
    finished_run: Path, tmp_path: Path, judge: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    command = ["sample", str(run), "--classifier", str(judge)]
    assert main([*command, "--keep-fraction", "1"]) == 0
    first = contents(run / "samples" / "accepted")
    assert {name for name in first if name.endswith(".png")} == {"grid.png", "classes.png"} | {
        f"images/{n:06d}.png" for n in range(5)
    }
    other = load_classifier(str(judge))
    save_classifier(judge, other.network, ClassifierConfig(architecture="resnet18", classes=CLASSES, size=(16, 16)), {})
    assert main([*command, "--keep-fraction", "1"]) == 0
    assert contents(run / "samples" / "accepted") == first
    assert (run / "samples" / "accepted-2" / "rejection.json").is_file()


def test_bad_requests_are_one_line_and_sample_nothing(
    finished_run: Path, tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(finished_run)
    sample = ["sample", str(finished_run)]
    fails(capsys, [*sample, "--keep-fraction", "0.5"], "--keep-fraction", "needs --classifier")
    fails(capsys, [*sample, "--classifier", str(judge)], "--classifier", "needs --keep-fraction")
    for fraction in ("0", "-1", "1.5", "nan"):
        fails(capsys, [*sample, f"--keep-fraction={fraction}", "--classifier", str(judge)], fraction, "at most 1")
    both = [*sample, "--keep-fraction", "0.5", "--classifier"]
    fails(capsys, [*both, "resnet51"], "resnet51", "neither a file", "resnet50")
    fails(capsys, [*both, str(tmp_path)], str(tmp_path), "a folder")
    foreign = tmp_path / "weights.pth"
    foreign.write_bytes(b"pickled")
    fails(capsys, [*both, str(foreign)], "weights.pth", "only weights in safetensors")
    autoencoder = finished_run / "autoencoder" / "model.safetensors"
    fails(capsys, [*both, str(autoencoder)], "model.safetensors", "(autoencoder), not of a classifier")
    spec = ClassifierConfig(architecture="resnet18", classes=CLASSES[1:], size=(16, 16))
    save_classifier(judge, spec.build(), spec, {})
    fails(capsys, [*both, str(judge)], "does not know the run's class", CLASSES[0])
    assert contents(finished_run) == before


def test_a_run_without_labels_is_refused(
    finished_run: Path, judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqvae2.data.code_store import CodeStore

    opened = CodeStore.open(finished_run / "codes" / "train")
    opened.header = opened.header.model_copy(update={"classes": ()})
    monkeypatch.setattr(CodeStore, "open", lambda *_: opened)
    command = ["sample", str(finished_run), "--keep-fraction", "0.5", "--classifier", str(judge)]
    fails(capsys, command, "--keep-fraction", "no class labels")
