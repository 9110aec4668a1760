"""Test loading pretrained models from files, folders and hub ids."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from sampling import VQVAE2Pipeline
from sampling.params import SamplingParams
from sampling.run_config import RunConfig
from tests.fake_hub import TOKEN, fake_hub
from tests.test_commands import contents, fails
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
    download.assert_called_once_with(filename="model.safetensors", repo_id="someone/faces")
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
    assert download.call_args.kwargs["repo_id"] == "someone/faces"


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
    monkeypatch.chdir(saved)
    assert main(["sample", ".", "--count", "2"]) == 0
    assert (saved / "faces-samples" / "manifest.json").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    fails(capsys, ["sample", "empty"], "empty: not a run folder")


def test_default_sampling_parameters_are_kept_and_used(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = RunConfig.from_resolved_yaml(run / "config.yaml")
    sampling = config.sampling.model_copy(update={"temperature": {"top": 0.5}, "top_p": 0.9})
    (run / "config.yaml").write_text(config.model_copy(update={"sampling": sampling}).to_yaml())
    pipeline = VQVAE2Pipeline.from_pretrained(run)
    pipeline.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = VQVAE2Pipeline.from_pretrained("~/saved")
    saved.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    again = VQVAE2Pipeline.from_pretrained(tmp_path / "again")
    expected = SamplingParams(temperature={"top": 0.5}, top_p=0.9)
    assert pipeline.sampling == saved.sampling == again.sampling == expected
    assert torch.equal(pipeline(2, seed=4), pipeline(2, seed=4, temperature={"top": 0.5}, top_p=0.9))
    one, both = {"bottom": 0.8}, {"bottom": 0.8, "top": 0.5}
    assert torch.equal(pipeline(2, seed=4, temperature=one), pipeline(2, seed=4, temperature=both))
    for model in ("run", "saved"):
        command = ["sample", str(tmp_path / model), "--count", "1", "--out", str(tmp_path / f"{model}-out")]
        assert main([*command, "--temperature", "bottom=0.8", "--top-p", "top=0.7"]) == 0
        params = json.loads((tmp_path / f"{model}-out" / "manifest.json").read_text())["sampling_params"]
        assert (params["temperature"], params["top_p"]) == (both, {"bottom": 0.9, "top": 0.7})
    assert main(["sample", str(run), "--help"]) == 0
    assert "(default: top=0.5)" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(pipeline(2, 4, temperature=1, top_p=1), VQVAE2Pipeline.from_pretrained(finished_run)(2, 4))
    again.save_pretrained(tmp_path / "again", SamplingParams(temperature=0.7))
    for folder, temperature in (("saved", "top=0.5"), ("again", "0.7")):
        card = (tmp_path / folder / "README.md").read_text()
        assert re.findall(r"\| temperature \| (.*) \|", card) == [temperature]
        digests = re.findall(r"^\| (\S+\.safetensors) \| `(\w+)` \|$", card, re.MULTILINE)
        assert digests == [(name, files.digest(tmp_path / folder / name)) for name, _ in digests]
        assert len(digests) == 3


def test_card_leaves_out_samples_and_metrics_of_other_networks(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    pipeline = VQVAE2Pipeline.from_pretrained(run)
    assert main(["evaluate", str(run), "--features", "efficientnet-lite0"]) == 0
    pipeline.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "Measured by `vqvae2 evaluate`" in card
    assert (tmp_path / "saved" / "samples.png").is_file()
    pipeline.priors[1].digest = "0" * 64  # as if it had been trained further
    pipeline.save_pretrained(tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert "On held-out images, at the end of training" in card
    assert "Measured by" not in card
    assert "samples.png" not in card
    assert not (tmp_path / "other" / "samples.png").exists()


def test_saved_models_do_not_contain_folders_of_this_computer(finished_run: Path, tmp_path: Path) -> None:
    """Runs of older versions have absolute paths in their weights."""
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    config = {"pretrained": "/private/runs/first", "loss": {"perceptual": {"weights": "~/secret/lpips.pth"}}}
    made_from = {"data": "/private/photos", "config": config, "pretrained": "0" * 64}
    pipeline.autoencoder.made_from = made_from
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.autoencoder.save_pretrained(tmp_path / "autoencoder")
    written = contents(tmp_path)
    assert not [name for name, data in written.items() if b"/private" in data or b"secret" in data]
    loaded = VQVAE2Pipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.autoencoder.digest == Autoencoder.from_pretrained(tmp_path / "autoencoder").digest
    config = {"pretrained": "first", "loss": {"perceptual": {"weights": "lpips.pth"}}}
    assert loaded.autoencoder.made_from == {"data": "photos", "config": config, "pretrained": "0" * 64}


def test_pipeline_moves_between_devices(finished_run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    assert pipeline.to("meta") is pipeline
    assert pipeline.device.type == "meta"
    assert {next(prior.parameters()).device.type for prior in pipeline.priors} == {"meta"}


def test_number_of_images_must_be_positive(finished_run: Path) -> None:
    with pytest.raises(UserError, match="num_images: must be at least 1, not 0"):
        VQVAE2Pipeline.from_pretrained(finished_run)(num_images=0)


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
        mock.patch("huggingface_hub.hf_hub_download", side_effect=OSError("Got: no network\nand more")),
        pytest.raises(UserError, match=r"someone/faces: .*failed: no network\. Check the path\.$"),
    ):
        weights_file("someone/faces")


def test_unknown_arguments_are_refused(finished_run: Path) -> None:
    for source in (finished_run, "scenes64"):
        for model in (VQVAE2Pipeline, Autoencoder):
            for options, message in (
                ({"torch_dtype": torch.bfloat16}, 'unknown argument torch_dtype. .* give dtype="bf16"'),
                ({"devcie": "cpu"}, r"unknown argument devcie\. Did you mean device\?"),
                ({"revision": "v1"}, "not a hub id, so it has no revision"),
            ):
                with pytest.raises(UserError, match=message):
                    model.from_pretrained(source, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


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


ROUND_TRIP = """
import contextlib, io, json, os, shutil, sys
import torch
from huggingface_hub import constants
from sampling import VQVAE2Pipeline
from vqvae2 import Autoencoder, UserError
from vqvae2.__main__ import main

run, saved = sys.argv[1:]
results = {}

def digests(pipeline):
    return [pipeline.autoencoder.digest, *(prior.digest for prior in pipeline.priors)]

def error_of(*arguments):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(list(arguments))
    return [status, stderr.getvalue()]

pipeline = VQVAE2Pipeline.from_pretrained(run)
results["commit"] = pipeline.push_to_hub("someone/faces", private=True)
pipeline.push_to_hub("someone/faces", dtype=torch.bfloat16, revision="half", commit_message="Half the size")
pipeline.autoencoder.push_to_hub("someone/codec")
shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
loaded = VQVAE2Pipeline.from_pretrained("someone/faces")
results["digests"] = [digests(pipeline), digests(loaded)]
results["equal samples"] = torch.equal(loaded(num_images=2, seed=3), pipeline(num_images=2, seed=3))
results["classes"] = loaded.class_names == pipeline.class_names
results["autoencoders"] = [
    Autoencoder.from_pretrained(name).digest for name in (run, "someone/faces", "someone/codec")
]
half = VQVAE2Pipeline.from_pretrained("someone/faces@half", cache_dir=saved + "/cache")
results["half"] = digests(half) == digests(VQVAE2Pipeline.from_pretrained("someone/faces", revision="half"))
results["bfloat16"] = digests(half) != digests(pipeline)
half.save_pretrained(saved + "/copy")
os.chdir(saved)
results["sample"] = error_of("sample", "someone/faces@half", "--count", "1")
results["errors"] = {
    "wrong id": error_of("sample", "someone/nothing"),
    "revision": error_of("sample", "someone/faces@v9"),
    "autoencoder only": error_of("sample", "someone/codec"),
    "no autoencoder": error_of("reconstruct", "someone/empty", "x.png"),
}
try:
    VQVAE2Pipeline.from_pretrained("someone/faces", token="wrong", cache_dir=saved + "/other")
except UserError as error:
    results["errors"]["token"] = [2, str(error)]
constants.HF_HUB_OFFLINE = True
results["offline"] = digests(VQVAE2Pipeline.from_pretrained("someone/faces")) == digests(pipeline)
results["errors"]["offline"] = error_of("sample", "someone/unseen")
print(json.dumps(results))
"""


def test_push_and_pull_through_the_real_client(finished_run: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.repos["someone/empty"] = {"main": {"README.md": b"nothing else"}}
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
        saved = tmp_path / "saved"
        saved.mkdir()
        finished = subprocess.run(
            [sys.executable, "-c", ROUND_TRIP, str(finished_run), str(saved)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        results = json.loads(finished.stdout.splitlines()[-1])
        assert results["commit"].startswith(f"{hub.address}/someone/faces/commit/")
        assert "someone/faces" in hub.private
        assert results["digests"][0] == results["digests"][1]
        assert len(set(results["autoencoders"])) == 1
        for name in ("equal samples", "classes", "half", "bfloat16", "offline"):
            assert results[name] is True, name
        assert results["sample"][0] == 0, results["sample"]
        assert (saved / "faces-samples" / "grid.png").is_file()
        for name, words in {
            "wrong id": ("someone/nothing: ", "downloading from the hub failed"),
            "revision": ("someone/faces@v9: ", "downloading from the hub failed"),
            "autoencoder only": ("someone/codec: no pipeline of vqvae2 in this repository",),
            "no autoencoder": ("someone/empty: ", "downloading from the hub failed"),
            "token": ("someone/faces: ", "downloading from the hub failed: 401"),
            "offline": ("someone/unseen: ", "downloading from the hub failed"),
        }.items():
            status, text = results["errors"][name]
            assert status == 2, name
            assert len(text.splitlines()) == 1, text
            assert all(word in text for word in words), text
        card = hub.repos["someone/faces"]["main"]["README.md"].decode()
        copied, half = (saved / "copy/README.md").read_text(), hub.repos["someone/faces"]["half"]["README.md"].decode()
        assert copied.partition("## Files")[0] == half.partition("## Files")[0]
        assert files.digest(saved / "copy/autoencoder/model.safetensors") in copied  # float32 again
        assert hub.repos["someone/faces"]["main"]["samples.png"] == (finished_run / "samples" / "grid.png").read_bytes()
        assert results["digests"][0][0] in card
        assert json.loads(hub.repos["someone/codec"]["main"]["config.json"])["size"] == [32, 32]


def test_model_card_has_metadata_settings_and_measurements(finished_run: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    pipeline.save_pretrained(tmp_path / "faces", SamplingParams(top_p=0.9))
    card = (tmp_path / "faces" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "vqvae2"
    assert "class-conditional" in metadata["tags"]
    summary = json.loads((finished_run / "prior-top" / "summary.json").read_text())["validation"]
    for expected in (
        "# faces\n",
        "Data set `scenes` (0.1 of it held out), labels: folder.",
        f"| prior-top nll | {summary['nll']:.4g} |",
        "| bottom | 8×8 | 16 | pixelcnn,",
        "## Default sampling parameters\n\n| parameter | value |\n|---|---|\n| temperature | 1 |\n",
        "| top_p | 0.9 |",
        "![Samples](samples.png)",
        f"| autoencoder/model.safetensors | `{pipeline.autoencoder.digest}` |",
    ):
        assert expected in text
    assert str(finished_run) not in card
    assert (tmp_path / "faces" / "samples.png").is_file()


def test_readme_of_a_run_folder_is_not_published(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "README.md").write_text("private notes")
    pipeline = VQVAE2Pipeline.from_pretrained(run)
    pipeline.save_pretrained(tmp_path / "faces")
    VQVAE2Pipeline.from_pretrained(finished_run).save_pretrained(tmp_path / "expected" / "faces")
    card = (tmp_path / "faces" / "README.md").read_text()
    assert card == (tmp_path / "expected" / "faces" / "README.md").read_text()
    (tmp_path / "faces" / "README.md").write_text("# The card of a saved pipeline\n")
    VQVAE2Pipeline.from_pretrained(tmp_path / "faces").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text().startswith("# The card of a saved pipeline\n")


def test_run_folders_are_not_overwritten(finished_run: Path) -> None:
    pipeline, before = VQVAE2Pipeline.from_pretrained(finished_run), contents(finished_run)
    with pytest.raises(UserError, match=rf"{finished_run}: a run folder.* Choose another folder\."):
        pipeline.save_pretrained(finished_run, dtype=torch.bfloat16)
    assert contents(finished_run) == before
