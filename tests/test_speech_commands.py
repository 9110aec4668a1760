"""Test the commands of the speech experiment as a user runs them, on synthetic tones."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from experiments.speech.speech_run import SpeechConfig
from tests.test_commands import contents, fails
from tests.test_configs import CONFIGS
from tests.test_two_processes import run_on_two_processes
from vqvae2.__main__ import main
from vqvae2.audio.audio_io import read_waveform
from vqvae2.data.code_store import CodeStore
from vqvae2.data.recordings import open_recordings
from vqvae2.priors import load_prior, save_prior

TINY = """
data: {{path: {path}, pattern: '(?P<content>\\w+)_(?P<speaker>\\w+)_\\d+', length: 512, crop: 256}}
model:
  downsamplings: 4
  channels: 8
  residual_layers: 1
  quantizer: {{kind: {kind}, codebook_size: 8, code_dim: 4}}
  decoder: {{channels: 8, skip_channels: 8, condition_channels: 8, cycles: 1, layers: 4}}
training: &training
  {{steps: 6, batch_size: 4, unquantized_steps: 2, ema_decay: 0.9, log_every: 2, validate_every: 3, preview_every: 6,
   checkpoint_every: 2}}
baseline: true
prior:
  model: {{kind: transformer, channels: 8, layers: 1, heads: 2}}
  training: {{steps: 4, batch_size: 8, log_every: 2, validate_every: 2, preview_every: 4, checkpoint_every: 2}}
"""


def write_config(folder: Path, tones: Path, kind: str = "ema") -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(path=tones, kind=kind))
    return path


@pytest.fixture(scope="module")
def trained(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    assert main(["speech", "train", str(write_config(folder, tones)), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_training_writes_every_artifact(trained: Path) -> None:
    for name in ("autoencoder", "baseline", "prior-top"):
        assert (trained / name / "model.safetensors").is_file()
    assert (trained / "autoencoder" / "previews" / "00000006.png").is_file()
    assert (trained / "prior-top" / "previews" / "00000004.png").is_file()
    train, val = (CodeStore.open(trained / "codes" / split) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert train.header.levels[0].shape == (1, 32)
    assert train.header.classes == ("anna: high", "anna: low", "ben: high", "ben: low")
    names = [train.image_name(index) for index in range(36)]
    labels = train.read(range(36)).label
    expected = [2 * ("ben" in name) + ("low" in name) for name in names]
    assert labels.tolist() == expected


def test_finished_run_is_skipped_and_other_settings_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "autoencoder" / "model.safetensors").stat().st_mtime_ns
    assert main(["speech", "train", str(trained / "config.yaml")]) == 0
    assert "already complete" in capsys.readouterr().out
    assert (trained / "autoencoder" / "model.safetensors").stat().st_mtime_ns == before
    fails(capsys, ["speech", "train", str(trained / "config.yaml"), "--training.steps", "8"], "training.steps = 6")


def test_few_steps_train_the_codebook(tones: Path, tmp_path: Path) -> None:
    settings = ["--training.steps", "2", "--training.unquantized-steps", "300", "--no-baseline"]
    command = ["speech", "train", str(write_config(tmp_path, tones)), "--run", str(tmp_path / "run"), *settings]
    assert main(command) == 0
    state = load_file(tmp_path / "run" / "autoencoder" / "model.safetensors")
    assert state["quantizer.initialized"].all()


def test_moved_run_resumes_in_its_new_folder(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("prior-top"))
    assert main(["speech", "train", str(moved / "config.yaml")]) == 0
    weights = Path("prior-top", "model.safetensors")
    assert (moved / weights).read_bytes() == (trained / weights).read_bytes()


def test_convert_and_sample_write_audio_and_a_page(trained: Path) -> None:
    assert main(["speech", "convert", str(trained), "--count", "2"]) == 0
    assert main(["speech", "sample", str(trained), "--count", "5", "--codes.temperature", "0.9"]) == 0
    page = (trained / "speech.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 2 * 3 + 5 + 2  # originals and two speakers, samples, spectrograms
    for source in sources:
        assert (trained / source).is_file()
    waveform, rate = soundfile.read(trained / "conversions" / "000-00.wav")
    assert (rate, len(waveform)) == (8000, 512)
    _, val = open_recordings(SpeechConfig.from_yaml(trained / "config.yaml").data)
    original = read_waveform(val.folder / val.names[0], val.config.sample_rate, val.config.peak)
    np.testing.assert_allclose(waveform[: len(original)], original[:512], atol=0.025)
    assert "anna: high" in page
    assert page.count(">as ben<") == page.count(">reconstruction<") == 2  # both recordings are of anna


def test_guidance_needs_a_prior_trained_with_label_dropout(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    command = ["speech", "sample", str(run), "--count", "1", "--codes.guidance-scale", "2"]
    fails(capsys, command, "guidance_scale 2: the prior of level top was trained without label dropout")
    path = run / "prior-top" / "model.safetensors"
    prior = load_prior(path)
    save_prior(path, prior, prior.config, **prior.made_from | {"label_dropout": 0.1})
    assert main(command) == 0


def test_convert_other_files(trained: Path, tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tones / "low_anna_3.wav")
    assert main(["speech", "convert", str(trained), "--files", file, "--speakers", "ben"]) == 0
    folder, page = map(Path, capsys.readouterr().out.splitlines()[-2:])
    assert folder.name.startswith("conversions")
    before = contents(folder)
    assert main(["speech", "convert", str(trained), "--count", "1"]) == 0
    assert contents(folder) == before, "conversions go to a new folder"
    assert "/000-01.wav" in page.read_text().partition(f'src="{folder.name}')[2]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [cell["caption"] for row in manifest["rows"] for cell in row["cells"]] == ["original", "as ben"]
    fails(capsys, ["speech", "convert", str(trained), "--speakers", "carl"], "no speaker 'carl'", "anna, ben")


def test_networks_work_without_the_recordings_they_were_trained_on(
    trained: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(tones), str(tmp_path / "other")))
    assert main(["speech", "sample", str(run), "--count", "1"]) == 0
    assert main(["speech", "convert", str(run), "--files", str(tones / "low_ben_1.wav")]) == 0
    (tmp_path / "other").mkdir()
    for take in range(2):
        soundfile.write(tmp_path / "other" / f"low_anna_{take}.wav", np.ones(9), 8000)
    fails(capsys, ["speech", "convert", str(run)], "trained on another `data`")


def test_codes_of_other_held_out_recordings_are_refused(
    trained: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(tones, tmp_path / "other")
    (other / "high_anna_0.wav").rename(other / "high_anna_00.wav")  # held out
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(tones), str(other)))
    for command in (["evaluate", str(run)], ["train", str(run / "config.yaml")]):
        fails(capsys, ["speech", *command], "codes/val: codes of other data than `data.path` has. Delete this folder")
    shutil.rmtree(run / "codes" / "val")
    assert main(["speech", "train", str(run / "config.yaml")]) == 0
    assert CodeStore.open(run / "codes" / "val").image_name(0) == "high_anna_00.wav"


def test_evaluate_recognizes_real_recordings(trained: Path) -> None:
    assert main(["speech", "evaluate", str(trained), "--samples", "6"]) == 0
    metrics = json.loads((trained / "evaluation" / "metrics.json").read_text())
    assert metrics["content_recognized"]["real"] == metrics["speaker_recognized"]["real"] == 1
    assert 0 < metrics["bits"]["autoencoder"] < 12
    assert set(metrics["bits"]) == {"autoencoder", "baseline", "unigram_entropy", "codes_per_sample"}
    assert 0 <= metrics["codes"]["speaker"] <= min(1, metrics["codes"]["entropy"]) + 1e-9
    assert set(metrics["speaker_recognized"]) == {
        "real",
        "reconstructions",
        "conversions",
        "conversions_as_source",
        "samples",
    }


def test_one_of_two_processes_writes(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("evaluation", "speech.html", "conversions", "samples"))
    commands = (f"convert {run} --count 2", f"sample {run} --count 2", f"evaluate {run} --samples 0")
    printed = run_on_two_processes(tmp_path, *(f"speech {command}" for command in commands))
    assert printed.count(f"{run}/speech.html") == 2
    assert printed.count("bits: autoencoder") == printed.count(f"{run}/evaluation/metrics.json") == 1
    assert main(["speech", "evaluate", str(trained), "--samples", "0"]) == 0
    expected = json.loads((trained / "evaluation" / "metrics.json").read_text())["bits"]
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["bits"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_resumed_training_gives_the_same_weights(
    kind: str, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tones, kind)
    for name in ("whole", "stopped"):
        command = ["speech", "train", str(config), "--run", str(tmp_path / name), "--no-baseline"]
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr("experiments.speech.stages.SpeechStage.after_update", _interrupt_at(4))
                with pytest.raises(_Interruption):
                    main(command)
            assert not (tmp_path / name / "autoencoder" / "model.safetensors").exists()
        assert main(command) == 0
    for stage in ("autoencoder", "prior-top"):
        whole, resumed = (load_file(tmp_path / name / stage / "model.safetensors") for name in ("whole", "stopped"))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name


class _Interruption(Exception):
    pass


def _interrupt_at(step: int):
    from experiments.speech.stages import SpeechStage

    original, calls = SpeechStage.after_update, []

    def after_update(self: SpeechStage, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        calls.append(1)
        if len(calls) == step:
            raise _Interruption

    return after_update


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.crop", "9999"], "crop (9999) must be at most length"),
        (["--data.length", "5100"], "data.length: 5100 is not divisible by"),
        (["--data.pattern", "("], "pattern: not a regular expression"),
        (["--data.pattern", "x"], "must have the named group"),
    ],
)
def test_wrong_settings_give_one_line_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["speech", "train", str(CONFIGS / "speech-digits.yaml"), *arguments], message)


@pytest.mark.parametrize("name", ["soundfile", "sklearn.svm"])
def test_missing_package_gives_a_one_line_error(
    name: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail
    package = {"soundfile": "soundfile", "sklearn.svm": "scikit-learn"}[name]
    fails(capsys, ["speech", "evaluate", str(trained), "--samples", "0"], f"needs the package {package}", "[speech]")


def test_wrong_commands_and_folders_give_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["speech"], "speech: no such command")
    fails(capsys, ["speech", "convrt"], "Did you mean speech convert?")
    fails(capsys, ["speech", "train"], "CONFIG: missing")
    fails(capsys, ["speech", "sample", str(tmp_path)], "not a run folder", "vqvae2 speech train")


def test_networks_of_other_runs_are_refused(
    trained: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    command = ["speech", "train", str(write_config(tmp_path, tones)), "--run", str(other), "--no-baseline"]
    assert main([*command, "--training.seed", "1"]) == 0
    weights = other / "autoencoder" / "model.safetensors"
    weights.write_bytes((trained / "autoencoder" / "model.safetensors").read_bytes())
    fails(capsys, ["speech", "sample", str(other)], "prior-top", "trained on another `autoencoder`")
    fails(capsys, [*command, "--training.seed", "1"], "codes of the autoencoder", "run `vqvae2 speech train`")


def test_config_in_the_repository_is_valid(tmp_path: Path) -> None:
    config = SpeechConfig.from_yaml(CONFIGS / "speech-digits.yaml")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert SpeechConfig.from_resolved_yaml(copy) == config
    assert config.data.length % config.model.samples_per_code == 0
