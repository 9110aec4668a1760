"""A run belongs to its folder and to its images: moved runs, other images, and two commands at once."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sampling.run_config import RunConfig
from tests.test_commands import contents, fails
from tests.test_commands import images as image_files
from vqvae2.__main__ import main
from vqvae2.data.sources import absolute_source


@pytest.fixture
def trained(tiny_config: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A config on 24 images in two class folders, and its run with a trained autoencoder."""
    for name in ("a", "b"):
        image_files(tmp_path / "images" / name, 12)
    text = tiny_config.read_text().replace("num_scenes: 200", f"path: {tmp_path / 'images'}")
    tiny_config.write_text(text)
    run = tmp_path / "run"
    assert main(["train-autoencoder", str(tiny_config), "--run", str(run)]) == 0
    return tiny_config, run


def test_other_images_are_refused_by_every_stage(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = trained
    moved = shutil.copytree(tmp_path / "images", tmp_path / "moved")
    command = ["extract-codes", str(config), "--run", str(run), "--data.path"]
    assert main([*command, str(moved)]) == 0  # the same names and labels are the same data
    for change in ("added", "removed", "relabeled"):
        other = shutil.copytree(tmp_path / "images", tmp_path / change)
        first = next((other / "a").iterdir())
        if change == "added":
            shutil.copy(first, other / "a" / "new.png")
        elif change == "removed":
            first.unlink()
        else:
            first.rename(other / "b" / f"moved-{first.name}")
        before = contents(run)
        for stage in ("train-autoencoder", "extract-codes", "run"):
            fails(capsys, [stage, *command[1:], str(other)], "data.path", str(other), "--run")
        assert contents(run) == before


def test_images_added_in_place_are_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = trained
    shutil.copy(next((tmp_path / "images" / "a").iterdir()), tmp_path / "images" / "b" / "zz.png")
    fails(capsys, ["extract-codes", str(config), "--run", str(run)], "data.path", "names, labels or number differ")


def test_moved_run_is_continued_where_it_is(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained
    moved = run.rename(tmp_path / "elsewhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert main(["train-autoencoder", "../elsewhere/config.yaml"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert not run.exists()
    assert not any((tmp_path / "cwd").iterdir())
    assert RunConfig.from_resolved_yaml(moved / "config.yaml").run == "../elsewhere"


def test_data_path_is_resolved_where_the_command_is_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert absolute_source("photos") == str(tmp_path / "photos")
    assert absolute_source("~/photos.zip") == str(tmp_path / "user" / "photos.zip")
    assert absolute_source("torchvision:CIFAR10") == f"torchvision:CIFAR10:{tmp_path / 'data'}"
    assert absolute_source("torchvision:CIFAR10:~/d") == f"torchvision:CIFAR10:{tmp_path / 'user' / 'd'}"
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    assert absolute_source("huggingface:./saved") == f"huggingface:{tmp_path / 'saved'}"
    for name in ("scenes", "scenes:10", "mazes:4", "huggingface:mnist", "s3://bucket/a{0..3}.tar", "/x/y"):
        assert absolute_source(name) == name


@contextmanager
def locked_by_another_process(folder: Path, shared: bool = False) -> Iterator[int]:
    """Lock a folder in a process, which is killed at the end. Yields its id."""
    code = (
        "import sys, time; from pathlib import Path; from vqvae2 import files\n"
        "files.lock_folder(Path(sys.argv[1]), sys.argv[2] == 'True'); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(shared)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        yield owner.pid
        owner.kill()
        owner.wait()


def test_two_commands_cannot_write_one_folder(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prepared = tmp_path / "out", tmp_path / "prepared"
    commands = {
        out: ["sample", str(finished_run), "--count", "2", "--out", str(out)],
        prepared: ["prepare", "scenes", str(prepared), "--size", "16", "--num-workers", "0"],
    }
    for folder, command in commands.items():
        with locked_by_another_process(folder) as pid:
            fails(capsys, command, str(folder), f"in use by process {pid} on")
            assert [path.name for path in folder.iterdir()] == [".lock"]
    assert main(commands[out]) == 0
    assert not (out / ".lock").exists()


def test_two_commands_cannot_use_one_run_folder(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = trained
    with locked_by_another_process(run) as pid:
        fails(capsys, ["extract-codes", str(config), "--run", str(run)], str(run), f"in use by process {pid} on")
    assert main(["extract-codes", str(config), "--run", str(run)]) == 0  # a killed owner leaves no lock


def test_two_commands_can_train_the_priors_of_two_levels(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    for level in ("top", "bottom"):
        shutil.rmtree(run / f"prior-{level}")
    command = [str(finished_run.parent / "tiny.yaml"), "--run", str(run)]
    with locked_by_another_process(run, shared=True) as owner:
        with locked_by_another_process(run / "prior-bottom") as pid:
            fails(capsys, ["train-prior", *command, "--level", "bottom"], "prior-bottom", f"in use by process {pid} on")
            assert main(["train-prior", *command, "--level", "top"]) == 0
        for alone in (["extract-codes", *command], ["train-prior", *command]):
            fails(capsys, alone, str(run), "in use by process")
        assert (run / ".lock").exists(), f"process {owner} still uses the folder"
    assert main(["train-prior", *command]) == 0
    assert not (run / ".lock").exists()
    for level in ("top", "bottom"):
        weights = Path(f"prior-{level}", "model.safetensors")
        expected = load_file(finished_run / weights)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(run / weights).items())


def test_artifacts_of_another_run_are_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "codes" / "train")
    shutil.copytree(finished_run / "codes" / "val", run / "codes" / "train")  # another split has other codes
    before = contents(run)
    fails(capsys, ["sample", str(run), "--seed", "9"], "prior-bottom", "not trained on the codes in", "codes/train")
    shutil.rmtree(run / "codes")
    shutil.copytree(finished_run / "codes", run / "codes")
    shutil.copy(run / "prior-bottom" / "model.safetensors", run / "prior-top" / "model.safetensors")
    fails(capsys, ["sample", str(run), "--seed", "9"], "prior-top/model.safetensors", "not the prior of level top")
    assert set(contents(run)) == set(before), "nothing was written"
