"""Test the autoencoder stage with all losses and phases: logs, checkpoints, resuming, accumulation, two processes."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from sampling.run_config import AutoencoderStageConfig, RunConfig
from tests.conftest import TINY
from tests.inception_fixture import two_processes
from train.loop import train
from train.lr_schedule import learning_rate
from train.run import Run
from train.stages.autoencoder import AutoencoderStage
from vqvae2.__main__ import main
from vqvae2.command_line import parse
from vqvae2.data.images import to_float
from vqvae2.data.splits import open_datasets
from vqvae2.errors import Stopped
from vqvae2.models import Autoencoder, AutoencoderConfig
from vqvae2.run_folder import RunFolder
from vqvae2.training_config import AutoencoderTrainingConfig

START = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a config with every loss term, without k-means and restarts, which depend on the micro-batches."""
    folder = tmp_path_factory.mktemp("adversarial")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet.pth")
    experiment = yaml.safe_load(TINY)
    for level in experiment["autoencoder"]["model"]["levels"]:
        level["quantizer"] |= {"kmeans_init": False, "dead_code_threshold": 0}
    experiment["data"]["num_scenes"] = 60
    experiment["autoencoder"]["training"] |= {"validate_every": 6, "preview_every": 6, "checkpoint_every": 3}
    experiment["autoencoder"]["loss"] = {
        "pixel": "l1",
        "perceptual": {"weight": 0.5, "network": "squeeze", "weights": str(folder / "squeezenet.pth")},
        "adversarial": {"weight": 0.1, "start": START, "discriminator": {"channels": 8, "layers": 2}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "config.yaml"


def train_stage(config: Path, folder: Path, *settings: str, stop_at: int | None = None) -> dict[str, Tensor]:
    """Train the stage in `folder` and return its newest checkpoint, including the discriminator."""
    run = Run(parse(RunConfig, settings, "test", RunConfig.from_yaml(config)), RunFolder(folder))
    stage = AutoencoderStage(run)
    update, updates = stage.after_update, []

    def stop(optimizer: torch.optim.Optimizer) -> None:
        update(optimizer)
        updates.append(1)
        if len(updates) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    stage.after_update = stop
    train(stage, run.config.autoencoder.training, run.folder.autoencoder.path, num_workers=0)
    newest = max(run.folder.autoencoder.checkpoints.iterdir())
    return {name: tensor.clone() for name, tensor in load_file(newest / "state.safetensors").items()}


def train_as_launched(config: Path, folder: Path, *settings: str) -> dict[str, Tensor]:
    """Train on a member of a process group, with Accelerate configured as by its launcher."""
    PartialState._reset_state()
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        state = train_stage(config, folder, *settings)
        assert PartialState().num_processes == 2
    PartialState._reset_state()
    return state


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    torch.set_num_threads(1)
    return folder, train_stage(config, folder)


def test_every_loss_term_is_logged_separately(uninterrupted: tuple[Path, dict[str, Tensor]]) -> None:
    lines = (uninterrupted[0] / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    logged = {entry["step"]: entry for entry in map(json.loads, lines) if "train/loss" in entry}
    always = {"l1", "perceptual", "commitment_bottom", "commitment_top", "codebook_top", "loss", "learning_rate"}
    always |= {f"{value}_{level}" for value in ("usage", "perplexity") for level in ("bottom", "top")}
    adversarial = {"adversarial", "discriminator", "score_real", "score_reconstructed"}
    names = {step: {key.removeprefix("train/") for key in entry} - {"step"} for step, entry in logged.items()}
    assert names == {2: always, 4: always | adversarial, 6: always | adversarial}
    for entry in logged.values():
        parts = entry["train/l1"] + 0.5 * entry["train/perceptual"] + 0.1 * entry.get("train/adversarial", 0)
        parts += 0.25 * (entry["train/commitment_bottom"] + entry["train/commitment_top"]) + entry["train/codebook_top"]
        assert entry["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert (uninterrupted[0] / "autoencoder" / "curves.png").is_file()


def test_discriminator_is_saved_in_checkpoints_only_and_trains_from_start_step(
    uninterrupted: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, state = uninterrupted
    discriminator = {name for name in state if name.startswith("discriminator-objective/discriminator.")}
    assert discriminator
    assert state["discriminator-optimizer/0/step"] == 6 - START
    assert state["optimizer/0/step"] == 6
    result = load_file(folder / "autoencoder" / "model.safetensors")
    assert result.keys() == {name.removeprefix("objective/network.") for name in state if name.startswith("objective/")}


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resumed_training_matches_uninterrupted_bit_for_bit(
    config: Path, uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path, stop_at: int
) -> None:
    with pytest.raises(Stopped):
        train_stage(config, tmp_path / "run", stop_at=stop_at)
    resumed = train_stage(config, tmp_path / "run")
    assert resumed.keys() == uninterrupted[1].keys()
    for name, tensor in uninterrupted[1].items():
        assert torch.equal(resumed[name], tensor), name


def test_gradient_accumulation_matches_full_batch(
    config: Path, uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    assert_close(
        train_stage(config, tmp_path / "run", "--autoencoder.training.gradient_accumulation_steps", "4"),
        uninterrupted[1],
    )


def test_two_processes_match_one(config: Path, uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    for state in two_processes(train_as_launched, config, tmp_path / "run"):
        assert_close(state, uninterrupted[1])
    logged = [
        (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()[-2]
        for run in (tmp_path / "run", uninterrupted[0])
    ]
    found, expected = ({k: v for k, v in json.loads(line).items() if "usage" in k} for line in logged)
    assert len(found) == 2
    assert found == pytest.approx(expected), "usage counts the codes of both processes"
    found, expected = ({k: v for k, v in json.loads(line).items() if "train/" in k} for line in logged)
    assert found == pytest.approx(expected, rel=1e-2), "losses are means over both processes"
    found, expected = (last_validation(run) for run in (tmp_path / "run", uninterrupted[0]))
    assert found == pytest.approx(expected, abs=1e-3)


def last_validation(run: Path) -> dict[str, float]:
    (*_, last) = [json.loads(line) for line in (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    return {name: value for name, value in last.items() if name.startswith("validation/")}


def test_codes_in_common_with_the_first_image_are_counted(
    config: Path, uninterrupted: tuple[Path, dict[str, Tensor]]
) -> None:
    run = uninterrupted[0]
    _, held_out = open_datasets(RunConfig.from_yaml(config).data)
    images = to_float(torch.stack([held_out[index].image for index in range(len(held_out))]))
    codes = Autoencoder.from_pretrained(run / "autoencoder").encode(images)
    logged = last_validation(run)
    for name, level in zip(("bottom", "top"), codes, strict=True):
        assert logged[f"validation/same_codes_{name}"] == pytest.approx(float((level[1:] == level[0]).float().mean()))


DECODER_STEPS = ["--autoencoder.training.decoder-steps", "2"]


def test_last_steps_train_only_the_decoder(config: Path, tmp_path: Path) -> None:
    before = train_stage(config, tmp_path / "before", "--autoencoder.training.steps", "4")
    state = train_stage(config, tmp_path / "run", *DECODER_STEPS)
    network = {name for name in before if name.startswith("objective/network.")}
    changed = {name.split(".")[1] for name in network if not torch.equal(before[name], state[name])}
    assert changed == {"decoder", "upsamplers"}
    last = json.loads((tmp_path / "run" / "autoencoder" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 6
    assert last["train/perceptual"] > 0
    updates = {
        int(tensor) for name, tensor in state.items() if name.startswith("optimizer/") and name.endswith("/step")
    }
    assert updates == {2}, "the moments of the steps before are discarded"


def test_decoder_steps_keep_the_averaged_weights_of_the_encoder(config: Path, tmp_path: Path) -> None:
    average = ["--autoencoder.training.ema-decay", "0.9"]
    with pytest.raises(Stopped):
        train_stage(config, tmp_path / "run", *DECODER_STEPS, *average, stop_at=4)
    before = load_file(tmp_path / "run" / "autoencoder" / "checkpoints" / "00000004" / "state.safetensors")
    state = train_stage(config, tmp_path / "run", *DECODER_STEPS, *average)
    encoder = [name for name in before if name.startswith("ema/encoder")]
    assert encoder
    for name in encoder:
        assert torch.equal(state[name], before[name]), name
        assert torch.equal(state[name.replace("ema/", "objective/network.")], before[name]), name


def test_decoder_steps_resume_exactly_and_match_in_two_processes(config: Path, tmp_path: Path) -> None:
    expected = train_stage(config, tmp_path / "run", *DECODER_STEPS)
    for stop_at in (4, 5):
        folder = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Stopped):
            train_stage(config, folder, *DECODER_STEPS, stop_at=stop_at)
        resumed = train_stage(config, folder, *DECODER_STEPS)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    for state in two_processes(train_as_launched, config, tmp_path / "pair", *DECODER_STEPS):
        assert_close(state, expected)


def test_learning_rate_restarts_for_the_decoder_steps() -> None:
    config = AutoencoderTrainingConfig(
        steps=100, decoder_steps=40, learning_rate=1.0, warmup_steps=10, schedule="cosine"
    )
    rates = [learning_rate(config, step) for step in (0, 9, 10, 35, 59, 60, 70, 85, 99)]
    assert rates == pytest.approx([0.1, 1, 1, 0.5, 0.001, 0.1, 1, 0.5, 0.003], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_steps": 11}, r"decoder_steps \(11\) must be at most steps \(10\)"),
        (
            {"decoder_steps": 8, "warmup_steps": 3},
            r"warmup_steps \(3\) must be less than decoder_steps \(8\), and than",
        ),
    ],
)
def test_impossible_decoder_steps_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderTrainingConfig(steps=10, **settings)


def test_all_steps_can_train_the_decoder_of_pretrained_weights_only() -> None:
    training = AutoencoderTrainingConfig(steps=10, decoder_steps=10)
    with pytest.raises(ValueError, match="decoder_steps: must be less than steps without"):
        AutoencoderStageConfig(training=training)
    assert AutoencoderStageConfig(pretrained="runs/other", model=AutoencoderConfig(), training=training)


def test_bfloat16_trains_and_keeps_float32_weights(config: Path, tmp_path: Path) -> None:
    settings = [
        "--autoencoder.training.mixed_precision",
        "bf16",
        "--autoencoder.training.gradient_accumulation_steps",
        "2",
    ]
    state = train_stage(config, tmp_path / "run", *settings, "--autoencoder.training.max-grad-norm", "1")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values()} <= {torch.float32, torch.int64, torch.bool}


def test_perceptual_loss_is_logged_from_its_start_step(config: Path, tmp_path: Path) -> None:
    train_stage(config, tmp_path / "run", "--autoencoder.loss.perceptual.start", "4")
    lines = (tmp_path / "run" / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    logged = {entry["step"]: entry for entry in map(json.loads, lines) if "train/loss" in entry}
    assert {step: "train/perceptual" in entry for step, entry in logged.items()} == {2: False, 4: False, 6: True}


def test_missing_perceptual_weights_fail_before_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--autoencoder.loss.perceptual.weights", str(tmp_path / "absent.pth")]
    assert main(["train-autoencoder", str(config), "--run", str(tmp_path / "run"), *missing]) == 2
    message = capsys.readouterr().err.strip()
    assert "autoencoder.loss.perceptual.weights" in message
    assert "absent.pth: no such file" in message
    assert "\n" not in message
    assert not (tmp_path / "run" / "autoencoder").exists()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that weights agree, on average, to a hundredth of an Adam step (3e-4, discriminator 1e-4).

    An element-wise bound would fail: if a gradient is almost zero, Adam turns its rounding error into a full step. This
    affects the last bias of the discriminator, whose hinge gradients cancel while all scores are between -1 and 1.
    """
    assert found.keys() == expected.keys()
    for kind in ("objective/", "discriminator-objective/"):
        names = [name for name in expected if name.startswith(kind) and name != f"{kind}discriminator.body.8.bias"]
        one, other = (torch.cat([state[name].double().flatten() for name in names]) for state in (found, expected))
        assert (one - other).abs().mean() < 1e-6, kind
