"""Start a run from an existing autoencoder: `autoencoder.pretrained`."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError

from sampling.run_config import RunConfig
from tests.conftest import TINY
from tests.test_commands import contents, fails
from train.checkpoints import Checkpoints
from vqvae2 import Autoencoder, files
from vqvae2.__main__ import main
from vqvae2.models import AutoencoderConfig
from vqvae2.run_folder import RunFolder


def write_config(path: Path, pretrained: Path | str, **training: int) -> Path:
    """Write the tiny config with a pretrained autoencoder in place of the settings of the model."""
    config = yaml.safe_load(TINY)
    config["autoencoder"] = {"pretrained": str(pretrained)}
    if training:
        config["autoencoder"]["training"] = training
    path.write_text(yaml.safe_dump(config))
    return path


def test_frozen_autoencoder_is_copied_and_shared(finished_run: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "frozen.yaml", finished_run)
    run = tmp_path / "run"
    assert main(["run", str(config), "--run", str(run)]) == 0
    original = finished_run / "autoencoder" / "model.safetensors"
    assert (run / "autoencoder" / "model.safetensors").read_bytes() == original.read_bytes()
    summary = json.loads((run / "autoencoder" / "summary.json").read_text())
    assert summary["steps"] == 0
    assert summary["validation"]["psnr"] > 10
    for name in ("report.html", "samples/grid.png", "autoencoder/previews/00000000.png"):
        assert (run / name).is_file()
    stores = [RunFolder(each).code_store("train") / "data.mdb" for each in (run, finished_run)]
    assert files.digest(stores[0]) == files.digest(stores[1]), "the same images have the same codes"


def test_fine_tuning_starts_from_the_weights_and_resumes(finished_run: Path, tmp_path: Path) -> None:
    training = {"steps": 4, "batch_size": 4, "checkpoint_every": 2}
    config = write_config(tmp_path / "tuned.yaml", finished_run / "autoencoder", **training)
    command = ["train-autoencoder", str(config), "--run"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, state: object) -> None:
        save(self, state)  # pyright: ignore[reportArgumentType]
        raise KeyboardInterrupt

    with mock.patch.object(Checkpoints, "save", save_and_die):
        assert main([*command, str(tmp_path / "killed")]) == 130
    assert main([*command, str(tmp_path / "killed")]) == 0
    original = Autoencoder.from_pretrained(finished_run)
    whole, killed = (Autoencoder.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert whole.digest == killed.digest
    assert whole.made_from["pretrained"] == original.digest
    difference = (whole.decoder[0].weight - original.decoder[0].weight).abs().max()
    assert 0 < difference < 4 * 4e-4, "four steps of Adam move a weight by about four learning rates"


def test_fine_tuning_does_not_resume_from_another_original(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished_run / "autoencoder", tmp_path / "original")
    config = write_config(tmp_path / "tuned.yaml", folder, steps=2, batch_size=4)
    command = ["train-autoencoder", str(config), "--run", str(tmp_path / "run")]
    assert main(command) == 0
    (tmp_path / "run" / "autoencoder" / "model.safetensors").unlink()
    model = Autoencoder.from_pretrained(folder)
    model.made_from = {}
    model.save_pretrained(folder)  # other bytes
    fails(capsys, command, "checkpoints", "trained on another `pretrained`")


def test_weights_of_another_image_size_are_adapted(finished_run: Path, tmp_path: Path) -> None:
    """The network is convolutional, so its weights do not depend on the size of the images."""
    config = write_config(tmp_path / "large.yaml", finished_run)
    assert main(["train-autoencoder", str(config), "--run", str(tmp_path / "run"), "--data.size", "64"]) == 0
    large, original = (Autoencoder.from_pretrained(each) for each in (tmp_path / "run", finished_run))
    assert large.size == (64, 64)
    assert all(torch.equal(tensor, large.state_dict()[name]) for name, tensor in original.state_dict().items())


def test_imported_file_is_accepted_as_it_is(tmp_path: Path) -> None:
    """A weights file alone, without a summary or settings, as `import-vqvae` writes it."""
    config = AutoencoderConfig(channels=8, residual_channels=4)
    config.build(size=(256, 256)).save(tmp_path / "imported.safetensors", imported_from="vqvae.pt")
    path = write_config(tmp_path / "imported.yaml", tmp_path / "imported.safetensors")
    assert main(["train-autoencoder", str(path), "--run", str(tmp_path / "run")]) == 0
    assert RunConfig.from_resolved_yaml(tmp_path / "run" / "config.yaml").autoencoder.model == config


def test_relative_path_is_recorded_as_absolute(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_run.parent)
    config = write_config(tmp_path / "frozen.yaml", finished_run.name)
    assert main(["train-autoencoder", str(config), "--run", str(tmp_path / "run")]) == 0
    assert RunConfig.from_resolved_yaml(tmp_path / "run/config.yaml").autoencoder.pretrained == str(finished_run)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--autoencoder.model.channels", "32"], "autoencoder.model.channels is 32, but {} has 16"),
        (["--data.channels", "1"], "data.channels is 1, but {} was trained on images with 3 channels"),
    ],
)
def test_other_settings_than_those_of_the_weights_are_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    config = write_config(tmp_path / "frozen.yaml", finished_run)
    command = ["train-autoencoder", str(config), "--run", str(tmp_path / "run"), *options]
    fails(capsys, command, expected.format(finished_run))
    assert not (tmp_path / "run").exists()


def test_missing_or_foreign_weights_are_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for source, problem in (
        (tmp_path / "none.safetensors", "no such file or folder"),
        (tmp_path / "empty", "neither model.safetensors nor"),
        (finished_run / "prior-top", "network type 'prior', expected 'autoencoder'"),
        (finished_run / "config.yaml", "corrupted"),
    ):
        config = write_config(tmp_path / "config.yaml", source)
        with mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("no network")):
            fails(capsys, ["train-autoencoder", str(config), "--run", str(tmp_path / "run")], str(source), problem)
        config.unlink()
    assert contents(tmp_path) == before


def test_steps_are_required_without_pretrained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(TINY.replace("steps: 6,", ""))
    fails(capsys, ["train-autoencoder", str(config)], "autoencoder", "training.steps: must be at least 1")


def test_autoencoder_of_a_hub_repository_of_a_pipeline(finished_run: Path) -> None:
    """A repository of a pipeline has the weights in a subfolder."""

    def download(repo_id: str, filename: str) -> str:
        del repo_id
        if filename == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(finished_run / filename)

    with mock.patch("huggingface_hub.hf_hub_download", download):
        digest = Autoencoder.from_pretrained("someone/faces").digest
    assert digest == files.digest(finished_run / "autoencoder" / "model.safetensors")
