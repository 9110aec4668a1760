"""Test loading pretrained models from files, folders and hub ids."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from sampling import VQVAE2Pipeline
from sampling.params import SamplingParams
from tests.test_commands import fails
from vqvae2 import Autoencoder, files
from vqvae2.__main__ import main
from vqvae2.data.images import to_float, to_uint8
from vqvae2.data.scenes import CLASSES, render
from vqvae2.errors import UserError
from vqvae2.hub import pipeline_folder, weights_file
from vqvae2.pictures import hwc_to_chw, load_image


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


def test_sample_command_takes_saved_pipelines_and_their_defaults(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, saved = VQVAE2Pipeline.from_pretrained(finished_run), tmp_path / "someone" / "faces"
    pipeline.save_pretrained(saved, SamplingParams(temperature={"top": 0.5}))
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(saved), "--count", "2"]) == 0
    manifest = json.loads((tmp_path / "faces-samples" / "manifest.json").read_text())
    assert manifest["sampling_params"]["temperature"] == {"top": 0.5}
    expected = to_uint8(pipeline(num_images=2, temperature={"top": 0.5}))
    assert torch.equal(load_image(tmp_path / "faces-samples" / "images" / "000001.png"), expected[1])
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(saved)):
        assert main(["sample", "someone/other", "--count", "2"]) == 0  # a hub id
    made = [tmp_path / f"{name}-samples" / "manifest.json" for name in ("faces", "other")]
    assert made[0].read_bytes() == made[1].read_bytes()
    picture = str(tmp_path / "faces-samples" / "images" / "000000.png")
    assert main(["variations", "someone/faces", picture, "--variants", "1", "--classes", "0"]) == 0
    assert (tmp_path / "faces-variations" / "grid.png").is_file()
    assert main(["reconstruct", "scenes64", picture]) == 0
    assert (tmp_path / "scenes64-reconstructions.png").is_file()
    (tmp_path / "empty").mkdir()
    fails(capsys, ["sample", "empty"], "empty: not a run folder")


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


def test_bfloat16_weights_take_half_the_size_and_load_as_float32(finished_run: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    pipeline.save_pretrained(tmp_path / "full")
    pipeline.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    loaded = VQVAE2Pipeline.from_pretrained(tmp_path / "half")
    for ours, other in zip((pipeline.autoencoder, *pipeline.priors), (loaded.autoencoder, *loaded.priors), strict=True):
        state = other.state_dict()
        for name, tensor in ours.state_dict().items():
            rounded = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
            assert torch.equal(state[name], rounded), name
    sizes = [(tmp_path / kind / "autoencoder" / "model.safetensors").stat().st_size for kind in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]  # the header is the same


def test_packaged_models_are_found_by_name(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    pipeline.save_pretrained(tmp_path / "pretrained" / "tiny")
    monkeypatch.setattr("vqvae2.hub._PACKAGED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert VQVAE2Pipeline.from_pretrained("tiny").autoencoder.digest == pipeline.autoencoder.digest
    assert Autoencoder.from_pretrained("tiny").digest == pipeline.autoencoder.digest
    with pytest.raises(UserError, match=r"absent: no such .* wrote, a packaged model \(tiny\), or a hub id OWNER/NAME"):
        VQVAE2Pipeline.from_pretrained("absent")


def test_scenes64_is_part_of_the_package() -> None:
    pipeline = VQVAE2Pipeline.from_pretrained("scenes64")
    assert pipeline.class_names == CLASSES
    scenes = to_float(torch.stack([hwc_to_chw(render(5000 + index, 64, 64)) for index in range(10)]))
    error = (pipeline.autoencoder.reconstruct(scenes) - scenes).square().mean() / 4
    assert -10 * error.log10() > 24
    folder = pipeline_folder("scenes64")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6e6
