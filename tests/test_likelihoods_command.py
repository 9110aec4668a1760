"""Test the command of the likelihood experiment as a user runs it, on the built-in images."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.likelihoods.likelihood_run import LikelihoodConfig, LikelihoodRun
from experiments.likelihoods.stage import LikelihoodStage
from tests.test_commands import fails
from tests.test_configs import CONFIGS
from train.accelerator import make_accelerator
from vqvae2.__main__ import main
from vqvae2.data.splits import open_datasets
from vqvae2.models.multi_sample_bounds import multi_sample_bound
from vqvae2.pictures import load_image
from vqvae2.run_folder import RunFolder

TINY = """
data: {{path: scenes, size: 32, num_scenes: 60, val_fraction: 0.2, num_workers: 0}}
network: {{stride: 8, channels: 8, residual_channels: 4, residual_layers: 1}}
capacities:
  - {{latents: 1, quantizer: {{kind: {kind}, codebook_size: 4, code_dim: 4}}}}
  - {{latents: 1, quantizer: {{kind: {kind}, codebook_size: 8, code_dim: 4}}}}
vimco_samples: 2
training:
  {{steps: 10, unquantized_steps: 1,
   batch_size: 4, ema_decay: 0.9, log_every: 2, validate_every: 3, preview_every: 10, checkpoint_every: 2}}
evaluation: {{samples: 3, batch_size: 5}}
"""
MODELS = {"vae-1", "vq-vae-1x4", "vimco-1x4", "vq-vae-1x8", "vimco-1x8"}


def write_config(folder: Path, kind: str = "ema") -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(kind=kind))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    torch.set_num_threads(1)
    assert main(["likelihoods", str(write_config(folder)), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_command_writes_models_table_and_plot(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.parent.name for path in compared.glob("*/model.safetensors")} == MODELS
    assert all((compared / name / "previews" / "00000010.png").is_file() for name in MODELS)
    assert min(load_image(compared / "likelihoods.png").shape[1:]) > 200
    before = {path: path.stat().st_mtime_ns for path in compared.glob("*/*.*")}
    assert main(["likelihoods", str(compared / "config.yaml")]) == 0  # skips what is complete, and prints the table
    assert {path: path.stat().st_mtime_ns for path in compared.glob("*/*.*")} == before
    output = capsys.readouterr().out
    assert "vae-1: already complete" in output
    header, line, *rows = output.splitlines()[-4:]
    assert header == "| latents | VAE | VAE, 3 samples | VQ-VAE | VIMCO, 2 samples | VIMCO, 3 samples |"
    assert line == "|---|---|---|---|---|---|"
    results = json.loads((compared / "results.json").read_text())["rows"]
    for row, result, size in zip(rows, results, (4, 8), strict=True):
        assert (result["latents"], result["codebook_size"]) == (16, size)
        bits = result["bits_per_dim"]
        assert bits["vq-vae"]["bound"] == pytest.approx(bits["vq-vae"]["multi_sample"])
        shown = [bits["vae"]["bound"], bits["vae"]["multi_sample"], bits["vq-vae"]["bound"]]
        shown += [bits["vimco"]["bound"], bits["vimco"]["multi_sample"]]
        assert row == f"| 16, K = {size} | {' | '.join(f'{value:.3f}' for value in shown)} |"
        assert all(4 < value < 12 for value in shown)
    assert results[0]["bits_per_dim"]["vae"] == results[1]["bits_per_dim"]["vae"]


def test_measurements_are_those_of_the_stored_models(compared: Path) -> None:
    config = LikelihoodConfig.from_resolved_yaml(compared / "config.yaml")
    run = LikelihoodRun(config, RunFolder(compared))
    _, held_out = open_datasets(config.data)
    images = torch.stack([held_out[index].image for index in range(len(held_out))])
    bits = json.loads((compared / "results.json").read_text())["rows"][1]["bits_per_dim"]
    for kind in ("vae", "vq-vae", "vimco"):
        capacity = config.capacities[1]
        model = run.build(kind, capacity)
        model.load_state_dict(load_file(run.stage(kind, capacity).weights))
        model.eval()
        with torch.no_grad():
            bounds = {"bound": model.bound(images), "multi_sample": multi_sample_bound(model.log_weights(images, 3))}
        for name, bound in bounds.items():
            expected = -float(bound.double().mean()) / (3 * 32 * 32 * math.log(2))
            assert bits[kind][name] == pytest.approx(expected, abs=0.02 if kind != "vq-vae" else 1e-6), (kind, name)


def test_measuring_leaves_the_random_numbers_of_training_alone(compared: Path) -> None:
    config = LikelihoodConfig.from_resolved_yaml(compared / "config.yaml")
    run = LikelihoodRun(config, RunFolder(compared))
    stage = LikelihoodStage(run, "vae", config.capacities[0])
    state = torch.get_rng_state()
    first = stage.validate(make_accelerator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert stage.validate(make_accelerator()) == first


def test_first_steps_do_not_quantize(compared: Path) -> None:
    config = LikelihoodConfig.from_resolved_yaml(compared / "config.yaml")
    training = config.training.model_copy(update={"steps": 40, "unquantized_steps": 3})
    run = LikelihoodRun(config.model_copy(update={"training": training}), RunFolder(compared))
    stage = LikelihoodStage(run, "vq-vae", config.capacities[0])
    for step, quantized in ((0, False), (2, False), (3, True), (39, True), (1, False)):
        stage.before_update(step)
        assert stage.objective.quantized == quantized
    assert training.model_copy(update={"steps": 20}).first_quantized_step == 2


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_resumed_training_gives_the_same_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, kind)
    for name in ("whole", "stopped"):
        command = ["likelihoods", str(config), "--run", str(tmp_path / name)]
        if name == "stopped":
            for model in ("vae-1", "vq-vae-1x4", "vimco-1x4"):  # each is stopped in its fifth step
                with monkeypatch.context() as patch:
                    patch.setattr(LikelihoodStage, "after_update", _interrupt(model, 5))
                    with pytest.raises(_Interruption):
                        main(command)
                assert not (tmp_path / name / model / "model.safetensors").exists()
        assert main(command) == 0
    for model in MODELS:
        whole, resumed = (load_file(tmp_path / name / model / "model.safetensors") for name in ("whole", "stopped"))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), (model, name)
    assert (tmp_path / "whole" / "results.json").read_bytes() == (tmp_path / "stopped" / "results.json").read_bytes()


class _Interruption(Exception):
    pass


def _interrupt(model: str, step: int):
    original, calls = LikelihoodStage.after_update, []

    def after_update(self: LikelihoodStage, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        if self.name == model:
            calls.append(1)
            if len(calls) == step:
                raise _Interruption

    return after_update


def test_other_settings_of_evaluation_measure_again(compared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    assert main(["likelihoods", str(run / "config.yaml"), "--evaluation.samples", "20"]) == 0
    before, after = (json.loads((path / "results.json").read_text())["rows"] for path in (compared, run))
    for kind in ("vae", "vimco"):
        old, new = before[0]["bits_per_dim"][kind], after[0]["bits_per_dim"][kind]
        assert old["bound"] == new["bound"]
        assert new["multi_sample"] < old["multi_sample"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network.stride", "5"], "data.size: 32 is not divisible by network.stride = 5. Choose"),
        (["--capacities.1.latents", "1"], "capacities: 1 latents with 256 codes occur twice"),
        (["--vimco-samples", "1"], "greater than or equal to 2"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--training.stepz", "1"], "--training.steps"),
    ],
)
def test_wrong_settings_give_one_line_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "likelihoods-32.yaml")
    fails(capsys, ["likelihoods", config, "--run", str(tmp_path / "run"), *arguments], message)


def test_runs_with_other_settings_or_damaged_files_give_one_line_errors(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["likelihoods"], "CONFIG: missing")
    fails(capsys, ["likelihoods", str(compared / "config.yaml"), "--training.steps", "8"], "training.steps = 10")
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    command = ["likelihoods", str(run / "config.yaml")]
    (run / "vae-1" / "evaluation.json").write_text("{")
    fails(capsys, command, "evaluation.json", "Delete it")
    (run / "vae-1" / "evaluation.json").unlink()
    shutil.copy(run / "vimco-1x4" / "model.safetensors", run / "vae-1" / "model.safetensors")
    fails(capsys, command, "vae-1", "network type 'vimco'", "expected 'vae'")


def test_config_in_the_repository_is_valid(tmp_path: Path) -> None:
    config = LikelihoodConfig.from_yaml(CONFIGS / "likelihoods-32.yaml")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert LikelihoodConfig.from_resolved_yaml(copy) == config
    assert config.positions == 64
