"""Test the commands end to end: a complete run, repeating and resuming it, and errors for invalid input."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sampling.params import SamplingConfig
from sampling.pipeline import VQVAE2Pipeline
from sampling.sample import sample_images
from vqvae2.__main__ import main


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """Check that the command exits with status 2 and a one-line error that contains `words`."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vqvae2: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path, count: int = 12, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_finished_run_has_all_files(finished_run: Path) -> None:
    for name in (
        "config.yaml",
        "autoencoder/model.safetensors",
        "autoencoder/curves.png",
        "autoencoder/previews/00000006.png",
        "codes/train/data.mdb",
        "codes/val/data.mdb",
        "prior-top/model.safetensors",
        "prior-bottom/previews/00000004.png",
        "samples/grid.png",
        "samples/images/000004.png",
    ):
        assert (finished_run / name).is_file(), name
    manifest = json.loads((finished_run / "samples" / "manifest.json").read_text())
    assert manifest["count"] == 5
    assert len(manifest["labels"]) == 5
    assert len(manifest["priors"]) == 2


def test_run_executes_all_stages_once(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inception_weights: Path
) -> None:
    command = ["run", str(tiny_config), "--run", str(tmp_path / "run")]
    command += ["--evaluation.inception-weights", str(inception_weights)]
    assert main(command) == 0
    first = capsys.readouterr().out
    for words in (
        "PSNR",
        "codes bottom",
        "prior top",
        "unigram",
        "too few images",
        "grid.png",
        "seconds",
        "report.html",
    ):
        assert words in first
    before = contents(tmp_path / "run")
    assert main(command) == 0
    second = capsys.readouterr().out
    assert second.count("already complete") == 4
    assert second.splitlines()[-8:] == first.splitlines()[-8:]
    assert contents(tmp_path / "run") == before


def test_run_supports_a_different_precision_per_stage(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inception_weights: Path
) -> None:
    command = [
        "run",
        str(tiny_config),
        "--run",
        str(tmp_path / "run"),
        "--priors.top.training.gradient_accumulation_steps",
        "2",
    ]
    command += ["--autoencoder.training.mixed_precision", "bf16", "--priors.bottom.training.mixed_precision", "bf16"]
    assert main([*command, "--evaluation.inception-weights", str(inception_weights)]) == 0
    assert "PSNR" in capsys.readouterr().out


def test_evaluate_without_inception_weights_reports_the_other_metrics(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "pt_inception-2015-12-05-6726825d.pth" in printed
    assert "--inception-weights" in printed
    assert "PSNR" in printed
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["fid"].keys() == {"missing"}


def test_sample_fills_in_missing_images_and_keeps_other_samples(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = contents(run / "samples" / "images")
    (run / "samples" / "images" / "000002.png").unlink()
    assert main(["sample", str(run)]) == 0
    assert contents(run / "samples" / "images") == before
    assert main(["sample", str(run), "--seed", "1", "--batch-size", "2"]) == 0
    other = contents(run / "samples-2" / "images")
    assert other.keys() == before.keys()
    assert all(other[name] != before[name] for name in before)
    assert contents(run / "samples" / "images") == before


def test_every_image_is_sampled_in_the_same_batch(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, ...]] = []
    sample_codes = VQVAE2Pipeline.sample_codes

    def recording(self: VQVAE2Pipeline, images: Any, *rest: Any, **options: Any) -> Any:
        batches.append(tuple(images))
        return sample_codes(self, images, *rest, **options)

    monkeypatch.setattr(VQVAE2Pipeline, "sample_codes", recording)
    command = ["sample", str(finished_run), "--count", "5", "--out", str(tmp_path / "out")]
    assert main([*command, "--batch-size", "2"]) == 0
    assert batches == [(0, 1), (2, 3), (4, 5)]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["batch_size"] == 2
    before = contents(tmp_path / "out" / "images")
    for number in (3, 4):
        (tmp_path / "out" / "images" / f"00000{number}.png").unlink()
    assert main([*command, "--batch-size", "4"]) == 0  # the job keeps its batch size
    assert batches[3:] == [(2, 3), (4, 5)]
    assert contents(tmp_path / "out" / "images") == before
    pipeline, config, progress = VQVAE2Pipeline.from_pretrained(finished_run), SamplingConfig(count=5), []
    for rank, share in ((0, [0, 1, 4]), (1, [2, 3])):
        process = SimpleNamespace(process_index=rank, num_processes=2)
        monkeypatch.setattr("sampling.sample.processes", lambda process=process: process)
        found = sample_images(pipeline, config, 2, range(5), show_progress=False)
        assert [sample.number for sample in found] == share
    list(pipeline.sample_batches(range(5), config, progress.append, batch_size=2))
    assert sum(progress) == 5 * pipeline.num_codes


def test_samples_are_independent_of_batch_size_and_count(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sample", str(finished_run), "--count", "3", "--batch-size", "1", "--classes", "0,1,2,3,4"]
    assert main([*command, "--out", str(out)]) == 0
    expected = contents(finished_run / "samples" / "images")
    assert contents(out / "images") == {name: expected[name] for name in ("000000.png", "000001.png", "000002.png")}


def test_reconstruct_writes_originals_next_to_reconstructions(finished_run: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 3)
    out = tmp_path / "out.png"
    files = [str(path) for path in sorted(folder.iterdir())]
    assert main(["reconstruct", str(finished_run), *files, "--levels", "--out", str(out)]) == 0
    with Image.open(out) as grid:
        # Columns: original, top only, top and bottom. Tiles are 32 px scaled by 3, with 2 px borders.
        assert grid.size == (3 * (96 + 2) + 2, 3 * (96 + 2) + 2)


def test_module_and_console_command_are_equivalent() -> None:
    result = subprocess.run([sys.executable, "-m", "vqvae2", "nonsense"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("vqvae2: nonsense: no such command.")
    assert main(["--version"]) == main(["--help"]) == main([]) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--data.pth", "x"], ["--data.pth", "--data.path"]),
        (["--data.path", "/does/not/exist"], ["/does/not/exist", "no such folder"]),
        (["--data.size", "36"], ["data.size", "36", "32 or 40"]),
        (["--data.size", "32", "8"], ["data.size", "at least 11", "not 8"]),
        (["--autoencoder.training.batch-size", "0"], ["batch-size", "greater than or equal to 1"]),
    ],
    ids=["misspelled", "missing folder", "size", "small size", "value"],
)
def test_invalid_settings_give_one_line_errors(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: list[str], words: list[str]
) -> None:
    fails(capsys, ["run", str(tiny_config), "--run", str(tmp_path / "run"), *override], *words)


def test_misspelled_config_key_gives_one_line_error(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.write_text(tiny_config.read_text().replace("val_fraction: 0.1", "validaton: 0.1"))
    fails(capsys, ["run", str(tiny_config), "--run", str(tmp_path / "run")], "data.validaton", "unknown key")
    assert not (tmp_path / "run").exists()


def test_unreadable_images_give_one_line_errors(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train-autoencoder", str(tiny_config), "--data.labels", "none", "--data.num_workers", "1"]
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(capsys, [*common, "--run", str(tmp_path / "a"), "--data.path", str(empty)], "no images in", "empty")
    cut = images(tmp_path / "cut")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(cut / "cut.jpg")
    (cut / "cut.jpg").write_bytes((cut / "cut.jpg").read_bytes()[:900])
    fails(capsys, [*common, "--run", str(tmp_path / "b"), "--data.path", str(cut)], "cut.jpg", "Remove or replace it")
    text = images(tmp_path / "text")
    (text / "text.png").write_text("not an image")
    fails(capsys, [*common, "--run", str(tmp_path / "c"), "--data.path", str(text)], "text.png", "Remove or replace it")


def test_run_with_another_config_raises_and_changes_nothing(
    tiny_config: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run)
    command = ["run", str(tiny_config), "--run", str(finished_run), "--autoencoder.model.channels", "24"]
    fails(capsys, command, str(finished_run), "autoencoder.model.channels = 16, not 24", "--run")
    assert contents(finished_run) == before


def test_store_of_another_autoencoder_raises_and_changes_nothing(
    tiny_config: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "autoencoder")
    shutil.rmtree(run / "prior-top")
    common = [str(tiny_config), "--run", str(run)]
    original = tiny_config.read_text()
    tiny_config.write_text(original.replace("steps: 6", "steps: 6, learning_rate: 0.002"))
    fails(capsys, ["train-autoencoder", *common], "autoencoder.training.learning_rate")
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "samples")
    other = tmp_path / "other"
    assert main(["train-autoencoder", str(tiny_config), "--run", str(other)]) == 0
    shutil.copytree(run / "codes", other / "codes")
    shutil.copytree(finished_run / "prior-top", other / "prior-top")
    shutil.copytree(finished_run / "prior-bottom", other / "prior-bottom")
    before = contents(other)
    for command in (["extract-codes"], ["run"]):
        fails(capsys, [*command, str(tiny_config), "--run", str(other)], "codes/train", "Delete this folder")
    shutil.rmtree(other / "prior-top")
    command = ["train-prior", str(tiny_config), "--run", str(other), "--level", "top"]
    fails(capsys, command, "codes/train", "Delete this folder")
    fails(capsys, ["sample", str(other)], "prior-bottom/model.safetensors", "Train this prior again")
    assert before.items() >= contents(other).items()


def test_sigterm_outside_training_prints_how_to_resume(finished_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vqvae2", "sample", str(finished_run), "--count", "5000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "images").glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM; completed work is kept; run the same command again to resume" in printed
    assert "Traceback" not in printed


def test_errors_name_the_missing_stage(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    fails(capsys, ["sample", str(run)], "no such file or folder. Give a run folder")
    common = [str(tiny_config), "--run", str(run)]
    fails(capsys, ["extract-codes", *common], "no such weights file")
    fails(capsys, ["train-prior", *common, "--level", "top"], "no code store")
    fails(capsys, ["train-prior", *common, "--level", "middle"], "no level 'middle'", "bottom, top")
    fails(capsys, ["sample", str(run)], "no such weights file")


def test_other_folders_are_not_overwritten(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "other")
    fails(capsys, ["run", str(tiny_config), "--run", str(folder)], "other", "not a run folder")
    assert len(list(folder.iterdir())) == 12


def test_invalid_sampling_settings_give_one_line_errors(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["sample", str(finished_run), "--classes", "99"], "no class 99", "0 to 9")
    fails(capsys, ["sample", str(finished_run), "--top-p", "1.5"], "--top-p", "less than or equal to 1")
