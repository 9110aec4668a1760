"""Test loading pretrained models from files, folders and hub ids."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from sampling import VQVAE2Pipeline
from vqvae2 import Autoencoder, files
from vqvae2.errors import UserError
from vqvae2.hub import pipeline_folder, weights_file


def test_autoencoder_loads_from_file_folder_and_hub(finished_run: Path, tmp_path: Path) -> None:
    folder = finished_run / "autoencoder"
    model = Autoencoder.from_pretrained(folder)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model.reconstruct(images)
    assert not model.training
    assert torch.equal(Autoencoder.from_pretrained(folder / "model.safetensors").reconstruct(images), expected)
    with mock.patch("huggingface_hub.hf_hub_download", return_value=str(folder / "model.safetensors")) as download:
        assert torch.equal(Autoencoder.from_pretrained("someone/faces").reconstruct(images), expected)
    download.assert_called_once_with("someone/faces", "model.safetensors")
    model.save_pretrained(tmp_path)
    assert files.digest(tmp_path / "model.safetensors") == model.digest


def test_pipeline_round_trip(finished_run: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = VQVAE2Pipeline.from_pretrained(tmp_path / "saved")
    assert loaded.class_names == pipeline.class_names
    assert [loaded.autoencoder.digest, *(p.digest for p in loaded.priors)] == [
        pipeline.autoencoder.digest,
        *(prior.digest for prior in pipeline.priors),
    ]
    assert torch.equal(loaded(num_images=3, seed=1), pipeline(num_images=3, seed=1))
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(tmp_path / "saved")) as download:
        assert len(VQVAE2Pipeline.from_pretrained("someone/faces").priors) == 2
    assert download.call_args.args == ("someone/faces",)


def test_prior_of_another_level_raises(finished_run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    VQVAE2Pipeline.from_pretrained(finished_run).save_pretrained(saved)
    (saved / "prior-top" / "model.safetensors").write_bytes((saved / "prior-bottom/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"prior-top/model\.safetensors: not the prior of level top"):
        VQVAE2Pipeline.from_pretrained(saved)


def test_missing_model_errors_name_the_source(tmp_path: Path) -> None:
    for source in (tmp_path / "model.safetensors", "a/b/c", "model.pt"):
        for find in (weights_file, pipeline_folder):
            with pytest.raises(UserError, match="no such file or folder"):
                find(source)
    with (
        mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("no network\nand more")),
        pytest.raises(UserError, match=r"someone/faces: .*failed: no network$"),
    ):
        weights_file("someone/faces")
