"""Experiment trackers: TensorBoard, Weights & Biases and MLflow through Accelerate."""

import importlib.util
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_commands import fails
from vqvae2.__main__ import main
from vqvae2.pictures import load_image


def command(config: Path, run: Path, *options: str) -> list[str]:
    return ["train-autoencoder", str(config), "--run", str(run), *options]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensorboard_has_the_metrics_and_the_previews(channels: int, tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(tiny_config, run, "--data.channels", str(channels))) == 0
    events = EventAccumulator(str(run / "autoencoder" / "logs"))
    events.Reload()
    logged = [json.loads(line) for line in (run / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["train/loss"] for entry in logged if "train/loss" in entry]
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [image.step for image in events.Images("preview")] == [3, 6]
    image = load_image(run / "autoencoder" / "previews" / "00000006.png")
    assert (events.Images("preview")[-1].height, events.Images("preview")[-1].width) == image.shape[1:]


def test_no_tracker_writes_no_events(tiny_config: Path, tmp_path: Path) -> None:
    assert main(command(tiny_config, tmp_path / "run", "--tracker", "none")) == 0
    assert not (tmp_path / "run" / "autoencoder" / "logs").exists()
    assert (tmp_path / "run" / "autoencoder" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_packages_are_named(
    name: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda each, *rest: None if each == name else find_spec(each, *rest)
    )
    fails(capsys, command(tiny_config, tmp_path / "run", "--tracker", name), f"pip install {name}")
