"""`vqvae2.load`: files, folders and hub ids."""

from pathlib import Path
from unittest import mock

import pytest
import torch

import vqvae2
from vqvae2.errors import UserError
from vqvae2.hub import weights_file


def test_a_file_a_folder_and_a_hub_id_give_the_same_model(finished_run: Path) -> None:
    folder = finished_run / "autoencoder"
    model = vqvae2.load(folder)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model.reconstruct(images)
    assert not model.training
    assert torch.equal(vqvae2.load(folder / "model.safetensors").reconstruct(images), expected)
    with mock.patch("huggingface_hub.hf_hub_download", return_value=str(folder / "model.safetensors")) as download:
        assert torch.equal(vqvae2.load("someone/faces").reconstruct(images), expected)
    download.assert_called_once_with("someone/faces", "model.safetensors")


def test_what_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    for source in (tmp_path / "model.safetensors", "a/b/c", "model.pt"):
        with pytest.raises(UserError, match="no such weights file"):
            weights_file(source)
    with (
        mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("no network\nand more")),
        pytest.raises(UserError, match=r"someone/faces: .*model\.safetensors.*\(no network\)$"),
    ):
        weights_file("someone/faces")
